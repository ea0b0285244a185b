"""Grouped routing in two levels: a weight per group, and weights within each group (AT-MoE, arXiv 2410.10896).

It knows nothing of tasks or names, only of columns: column c of the logits is one expert, and belongs to one group.
Read first: rows of many mixtures share one matrix, as in `runtime.kernels.routing`; temperatures and what a caller adds
to the groups are in the logits already.
"""

from __future__ import annotations

import torch

_NEVER = -1e30  # finite, so that a row without any allowed place gives zeros and not NaN


def grouped_weights(
    group_logits: torch.Tensor,
    expert_logits: torch.Tensor,
    *,
    group_allowed: torch.Tensor,
    allowed: torch.Tensor,
    member: torch.Tensor,
    epsilon: torch.Tensor,
) -> torch.Tensor:
    """`w[t, c] = g[t, m(c)] * a[t, c]`, with g the softmax over groups and a the softmax within the group of c.

        g[t] = softmax(group_logits[t]) over the allowed groups, then 0 where it is below epsilon
        a[t, c] = exp(expert_logits[t, c]) / sum of exp(expert_logits[t, c']) over the allowed c' with m(c') = m(c)

    The in-group softmax depends on the input (ours; the paper's formula is not consistent in its shapes). What a group
    below epsilon would have had is dropped and not given to others, so that it bounds the error (ours): at most
    `(G - 1) epsilon` of the weight is missing.

    Args:
        group_logits: [T, G] float32, `(x W_G + bias) / tau_g`.
        expert_logits: [T, C] float32, `x W_D / tau_d`.
        group_allowed: [T, G] bool; a row may allow nothing, its weights are then all zero.
        allowed: [T, C] bool, the experts of a row; a group that is allowed must hold one.
        member: [C] int64, m(c); any group for columns that no row allows.
        epsilon: [T] float32, >= 0 and < 1.

    Returns:
        [T, C] float32; a row sums to 1 less what was skipped, or to 0; exactly 0 wherever nothing is allowed.
    """
    groups = torch.softmax(group_logits.masked_fill(~group_allowed, _NEVER), dim=1) * group_allowed  # [T, G]
    groups = groups * (groups >= epsilon.unsqueeze(1))
    masked = expert_logits.masked_fill(~allowed, _NEVER)
    places = member.expand_as(masked)
    highest = torch.full_like(group_logits, _NEVER).scatter_reduce(1, places, masked.detach(), "amax")
    parts = torch.exp(masked - highest.gather(1, places)) * allowed  # [T, C]
    totals = torch.zeros_like(group_logits).index_add(1, member, parts)  # [T, G]
    return groups.gather(1, places) * parts / totals.gather(1, places).clamp(min=torch.finfo(torch.float32).tiny)
