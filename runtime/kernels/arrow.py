"""Arrow: routing by the direction that each expert amplifies most, without training (arXiv 2405.11157).

It knows nothing of tasks, only of one layer's updates and tokens.
Read first: a prototype has length 1 and no sign, so tokens are compared by the absolute value of the product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def arrow_prototype(updates: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The unit vector v that maximises `|M v|`, M being the updates `B A` of one input one above the other.

    That is M's first right singular vector; its sign is chosen so that its largest entry is positive. Computed in
    float64 out of the ranks alone: with `A^T = Q R`, v is Q times the first eigenvector of `R (sum B^T B) R^T`. One
    vector for all linears that read the same input (ours; the paper has one per linear).

    Args:
        updates: per linear A [R, D] and B [H, R], scales in B; at least one.

    Returns:
        [D] float32; all zero where every update is zero.
    """
    a = torch.cat([a for a, _ in updates]).double()
    gram = torch.block_diag(*(b.double().t() @ b.double() for _, b in updates))  # type: ignore[no-untyped-call]
    q, r = torch.linalg.qr(a.t())
    values, vectors = torch.linalg.eigh(r @ gram @ r.t())
    prototype: torch.Tensor = q @ vectors[:, -1]
    if values[-1] <= 0:
        return torch.zeros(a.shape[1])
    return (prototype * prototype[prototype.abs().argmax()].sign()).float()
