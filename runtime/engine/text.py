"""Tokens to text as they come, and stop strings.

It knows nothing of models; it decodes with the tokenizer's own incremental decoder.
Read first: text that might be the beginning of a stop string is held back until it is clear.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one answer.

    Args:
        tokenizer: the backend tokenizer.
        stop: strings that end the answer.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._held = ""
        self._ids: list[int] = []
        self._num_decoded = 0

    def push(self, token_id: int) -> tuple[str, bool]:
        """Take a token; return the text that can be shown now, and whether a stop string was completed."""
        piece = self._decoder.step(self._tokenizer, token_id) or ""
        self._ids.append(token_id)
        self._num_decoded += len(piece)
        self._held += piece
        ends = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            text, self._held = self._held[: min(ends)], ""
            return text, True
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text, False

    def finish(self) -> str:
        """Return what was held back, incomplete characters included; the answer ended without a stop string."""
        whole: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        text, self._held = self._held + whole[self._num_decoded :], ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that ends `text`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
