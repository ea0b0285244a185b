"""Penalties for tokens that were there before: repetition, presence and frequency.

It knows nothing of sampling's other steps.
Read first: the repetition penalty looks at prompt and answer, the other two at the answer alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from runtime.engine.request import SamplingParams


class Penalties:
    """What one answer has said so far, and what saying it again costs.

    Args:
        params: the penalties.
        prompt: token ids.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        self._repetition = params.repetition_penalty
        self._presence = params.presence_penalty
        self._frequency = params.frequency_penalty
        self._seen = dict.fromkeys(prompt)
        self._said: Counter[int] = Counter()

    @property
    def active(self) -> bool:
        """Whether `apply` can change anything."""
        return self._repetition != 1 or self._presence != 0 or self._frequency != 0

    def apply(self, scores: torch.Tensor) -> None:
        """Change logits `scores` [V] in place.

        Of tokens seen: `s / repetition if s > 0 else s * repetition` (CTRL, arXiv 1909.05858, section 4.1).
        Of tokens said c times: `s - presence - c * frequency`.
        """
        if self._repetition != 1 and self._seen:
            ids = torch.tensor(list(self._seen))
            values = scores[ids]
            scores[ids] = torch.where(values > 0, values / self._repetition, values * self._repetition)
        if self._said and (self._presence or self._frequency):
            ids = torch.tensor(list(self._said))
            counts = torch.tensor(list(self._said.values()), dtype=scores.dtype)
            scores[ids] -= self._presence + self._frequency * counts

    def add(self, token: int) -> None:
        """The answer has said `token`."""
        self._seen[token] = None
        self._said[token] += 1
