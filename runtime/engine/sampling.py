"""Choosing the next token of each sequence from its logits.

It knows nothing of sequences' other state; `transformers` gives the logits processors.
Read first: every request draws from its own generator, so what it gets does not depend on what else is in the batch.
"""

from __future__ import annotations

import secrets

import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from runtime.engine.request import SamplingParams


class Sampler:
    """Draws tokens for one request: greedy at temperature 0, else from the warped distribution."""

    def __init__(self, params: SamplingParams) -> None:
        self._greedy = params.temperature == 0
        self._warpers: list[TemperatureLogitsWarper | TopKLogitsWarper | TopPLogitsWarper] = []
        if self._greedy:
            return
        self._generator = torch.Generator().manual_seed(secrets.randbits(63) if params.seed is None else params.seed)
        if params.temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(params.temperature))
        if params.top_k:
            self._warpers.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            self._warpers.append(TopPLogitsWarper(params.top_p))

    def choose(self, logits: torch.Tensor) -> int:
        """Return the next token for logits [V] float32."""
        if self._greedy:
            return int(logits.argmax())
        scores = logits.unsqueeze(0).cpu()
        for warper in self._warpers:
            scores = warper(None, scores)
        return int(torch.multinomial(torch.softmax(scores[0], dim=0), 1, generator=self._generator))
