"""Cross-entropy of answers over a large vocabulary, without ever holding the logits in float32.

It does not know models, batches or what is trained.
Read first: the backward pass is done in the forward pass, a few rows at a time while they are in the cache of the
processor. On CPUs the loss is bound by memory: logits of a batch are larger than all weights of several layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy

_ROWS = 16  # of 49,152 float32 logits: 3 MB


def mean_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`mean_t (log sum_v exp(l[t, v]) - l[t, target[t]])`, a scalar in nats, computed in float32.

    Args:
        logits: [n, V], any float dtype; n >= 1. Gradients come back in the same dtype.
        targets: [n] int64.
    """
    if logits.device.type != "cpu":
        return cross_entropy(logits.float(), targets)
    loss: torch.Tensor = _MeanCrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return loss


class _MeanCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - torch's own
        num = len(targets)
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits) if wants_gradient else None
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, num, _ROWS):
            rows = slice(start, start + _ROWS)
            wanted = targets[rows].unsqueeze(1)
            some = logits[rows].float()  # [r, V]
            shares = torch.softmax(some, dim=1)
            # log sum exp(l) = max(l) - log(max(p)); the largest share is at least 1 / V, so its logarithm is exact.
            most = some.max(1, keepdim=True)
            losses = most.values - shares.gather(1, most.indices).log() - some.gather(1, wanted)
            total += losses.double().sum()
            if gradient is not None:
                shares.scatter_add_(1, wanted, torch.full_like(losses, -1.0))
                gradient[rows] = shares.mul_(1 / num)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return (total / num).float()

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ANN401
        (gradient,) = ctx.saved_tensors
        return gradient * slope.to(gradient.dtype), None
