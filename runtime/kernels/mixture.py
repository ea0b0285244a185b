"""The mixture op `y[t] += sum_e w[t, e] * scale[e] * B_e A_e x[t]`: loop reference, and the packed form for CPUs.

It knows nothing of where experts come from or how the weights were routed.
Read first: experts of different ranks are packed side by side along the rank, without padding; column r of the packed
intermediate belongs to expert `owner[r]`, and the router's weight is applied to it there, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


def mixture_loop(
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    scales: Sequence[float],
    weights: torch.Tensor,
) -> torch.Tensor:
    """Reference: `y[t] = sum_e weights[t, e] * scales[e] * b[e] @ (a[e] @ x[t])`, one token and expert at a time.

    Args:
        x: [T, D].
        a: per expert [R_e, D].
        b: per expert [H, R_e].
        scales: per expert.
        weights: [T, E].

    Returns:
        [T, H] float32, computed in float32 throughout.
    """
    y = torch.zeros(x.shape[0], b[0].shape[0], dtype=torch.float32)
    for t in range(x.shape[0]):
        for e in range(len(a)):
            if weights[t, e] != 0:
                y[t] += weights[t, e].float() * scales[e] * (b[e].float() @ (a[e].float() @ x[t].float()))
    return y


@dataclass(frozen=True)
class PackedUpdate:
    """The updates of one linear by several experts, packed along the rank.

    Args:
        a: [sum R, D], the rows of all A.
        b: [sum R, H], the columns of all `scale * B`, as rows.
        owner: [sum R] int64, which expert a row belongs to.
    """

    a: torch.Tensor
    b: torch.Tensor
    owner: torch.Tensor


def pack(
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    scales: Sequence[float],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> PackedUpdate:
    """Pack the updates of one linear.

    Args:
        a: per expert [R_e, D].
        b: per expert [H, R_e].
        scales: per expert; multiplied into B in float32.
        dtype: of the packed matrices.
        device: where they go.
    """
    ranks = torch.tensor([tensor.shape[0] for tensor in a])
    scaled = [tensor.t().float() * scale for tensor, scale in zip(b, scales, strict=True)]
    return PackedUpdate(
        a=torch.cat([tensor.to(device, dtype) for tensor in a]),
        b=torch.cat([tensor.to(device, dtype) for tensor in scaled]),
        owner=torch.repeat_interleave(torch.arange(len(a)), ranks).to(device),
    )


def shrink(x: torch.Tensor, a: torch.Tensor, rank_weights: torch.Tensor) -> torch.Tensor:
    """Return `(x A^T) * w`: [T, D] x [S, D] x [T, S] -> [T, S], weighted in float32, in the dtype of `x`."""
    return (torch.nn.functional.linear(x, a).float() * rank_weights).to(x.dtype)


def add_mixture(y: torch.Tensor, x: torch.Tensor, update: PackedUpdate, rank_weights: torch.Tensor) -> None:
    """`y[t] += sum_r ((A x[t])[r] * rank_weights[t, r]) * B[r]` over all packed rank rows r, in place.

    With `rank_weights[t, r] = w[t, owner[r]]` this is the mixture; a caller with router columns spreads them itself.
    Operations: 2 * T * sum R * (D + H); every packed expert is multiplied for every token and masked by its weight, so
    pack only experts that some token of the batch may use.

    Args:
        y: [T, H], changed.
        x: [T, D].
        update: packed experts.
        rank_weights: [T, sum R] float32, zero where a token does not use an expert.
    """
    y.addmm_(shrink(x, update.a, rank_weights), update.b)
