"""How likely the model finds a given continuation, read off while the prompt with it runs through the last layers.

It knows nothing of queues or caches.
Read first: the token at position p is scored by the residual stream at p - 1, so the context's last token scores the
continuation's first, and its last token scores nothing.
"""

from __future__ import annotations

import torch

from runtime.engine.logprobs import continuation_logprobs
from runtime.engine.sequence import Sequence
from runtime.engine.step_protocol import StepModel

MAX_ROWS = 64
"""Logits held at once; a row is as wide as the vocabulary."""


def score_part(model: StepModel, sequence: Sequence, start: int, hidden: torch.Tensor) -> None:
    """Append to `sequence.scored` what the tokens `start .. start + T` say of the ones after them.

    Args:
        model: gives logits.
        sequence: with a continuation; its parts come in order.
        start: position of the first token.
        hidden: [T, D], residual stream after the last layer.
    """
    first = max(start, sequence.answering.start)
    last = min(start + hidden.shape[0], sequence.answering.stop)
    for begin in range(first, last, MAX_ROWS):
        end = min(begin + MAX_ROWS, last)
        logits = model.logits(hidden[begin - start : end - start])
        sequence.scored += continuation_logprobs(logits, sequence.prompt[begin + 1 : end + 1])
