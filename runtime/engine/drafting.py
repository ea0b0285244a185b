"""Speculative decoding by n-gram lookup: what followed the newest tokens earlier is tried again, several tokens a step.

It knows nothing of tensors or mixtures; the runner runs the drafts and tells what the model would have said.
Read first: only greedy answers without options are drafted for, and a draft counts as far as it is what the model
chooses itself, so answers are those without drafts (prompt lookup, after speculative decoding, arXiv 2211.17192). The
base as a drafter for its own mixtures would not pay: it costs as much per token as the mixture does.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from runtime.engine.sequence import Phase, Sequence

LONGEST, SHORTEST = 3, 2  # tokens of the n-grams that are looked up
STEP_TOKENS = 8  # beyond this many tokens a step costs more for each of them, and drafts have to earn it


class NGrams:
    """Where n-grams of a growing text were last followed by something.

    Args:
        tokens: the text so far.
    """

    def __init__(self, tokens: Items[int]) -> None:
        self._tokens: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Items[int]) -> None:
        """Append tokens."""
        for token in tokens:
            for size in range(SHORTEST, LONGEST + 1):
                if len(self._tokens) >= size:
                    self._follows[tuple(self._tokens[-size:])] = len(self._tokens)
            self._tokens.append(token)

    def propose(self, length: int) -> list[int]:
        """Up to `length` tokens that followed the longest known n-gram at the end, the last time it was there."""
        for size in range(LONGEST, SHORTEST - 1, -1):
            place = self._follows.get(tuple(self._tokens[-size:])) if len(self._tokens) >= size else None
            if place is not None:
                return self._tokens[place : place + length]
        return []


class Drafting:
    """Drafts for the sequences of a step, and how well they fared.

    Args:
        max_draft: tokens of one draft at most; 0 drafts nothing.

    `drafted` and `accepted` count tokens.
    """

    def __init__(self, max_draft: int) -> None:
        self._max_draft = max_draft
        self._texts: dict[Sequence, NGrams] = {}
        self._lengths: dict[Sequence, int] = {}
        self.drafted = self.accepted = 0

    def propose(self, decoding: Items[Sequence]) -> dict[Sequence, list[int]]:
        """A draft for each sequence that can have one, as long as the step stays small."""
        if not self._max_draft:
            return {}
        for sequence in [each for each in self._texts if each.phase is Phase.ENDED]:
            del self._texts[sequence], self._lengths[sequence]
        drafts, left = {}, STEP_TOKENS - len(decoding)
        for sequence in decoding:
            room = min(left, self._lengths.setdefault(sequence, 1), sequence.max_tokens - len(sequence.output) - 1)
            if room > 0 and sequence.sampler.plain and not sequence.request.explain:
                draft = self._text(sequence).propose(room)
                if draft:
                    drafts[sequence] = draft
                    left -= len(draft)
        return drafts

    def judge(self, sequence: Sequence, draft: Items[int], best: Items[int]) -> int:
        """How many tokens of a draft hold; `best[i]` is what the model chooses before `draft[i]`."""
        held = next((i for i, token in enumerate(draft) if best[i] != token), len(draft))
        self.drafted += len(draft)
        self.accepted += held
        length = 2 * len(draft) if held == len(draft) else max(1, held)
        self._lengths[sequence] = min(self._max_draft, length)
        return held

    def _text(self, sequence: Sequence) -> NGrams:
        text = self._texts.get(sequence)
        if text is None:
            text = self._texts[sequence] = NGrams(sequence.prompt)
        text.extend(sequence.output[len(text) - len(sequence.prompt) :])
        return text
