"""From logits to what a token is drawn from: temperature, top-k, top-p and min-p, in this order.

It knows nothing of generators or sequences.
Read first: what each keeps is what the warpers of `transformers` keep, which sort the whole vocabulary; here nothing is
sorted but the likeliest tokens. A token whose cumulative mass lies within float32 rounding of top-p may be judged
otherwise than there, where the sum of the whole vocabulary is rounded.
"""

from __future__ import annotations

import torch

from runtime.engine.request import SamplingParams

CANDIDATES = 1024
"""Tokens that are sorted for top-p; where they do not hold its mass, all are."""

_NEVER = -torch.inf


def warp(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Scores [V] float32 with `-inf` for tokens that are not to be drawn; `scores` itself is left as it is."""
    if params.temperature != 1:
        scores = scores / params.temperature
    if params.top_k > 0:
        scores = _top_k(scores, params.top_k)
    if params.top_p < 1:
        scores = _top_p(scores, params.top_p)
    return _min_p(scores, params.min_p) if params.min_p > 0 else scores


def _top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Keep scores of at least the k-th largest."""
    least = scores.topk(min(k, scores.shape[0])).values[-1]
    return scores.masked_fill(scores < least, _NEVER)


def _top_p(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the likeliest tokens before which less than `top_p` of the mass lies; always the first."""
    largest, tokens = scores.topk(min(CANDIDATES, scores.shape[0]))
    mass = (largest.double() - torch.logsumexp(scores, 0).double()).exp().cumsum(0)
    if mass[-1] < top_p and len(tokens) < len(scores):
        from transformers import TopPLogitsWarper  # whose import takes seconds, and this is rare

        every: torch.Tensor = TopPLogitsWarper(top_p)(None, scores.unsqueeze(0))
        return every[0]
    num_kept = 1 + int((mass[:-1] < top_p).sum())
    kept = torch.full_like(scores, _NEVER)
    kept[tokens[:num_kept]] = largest[:num_kept]
    return kept


def _min_p(scores: torch.Tensor, min_p: float) -> torch.Tensor:
    """Keep tokens at least `min_p` times as likely as the likeliest."""
    probabilities = torch.softmax(scores, 0)
    return scores.masked_fill(probabilities < min_p * probabilities.max(), _NEVER)
