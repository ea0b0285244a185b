"""Router arithmetic: from logits to the weights of the experts of each token.

It knows nothing of tasks or experts, only of columns: column c of the logits is one visible expert of one mixture.
Read first: rows of many mixtures share one matrix; `allowed` says which columns belong to a row's own mixture.
"""

from __future__ import annotations

import torch

_NEVER = -1e30  # finite, so that a row without any allowed column gives zeros and not NaN


def top_k_weights(logits: torch.Tensor, allowed: torch.Tensor, k: torch.Tensor, k_max: int) -> torch.Tensor:
    """Softmax over the allowed columns, keep each row's k largest, renormalise over them.

    `w[t] = p[t] * kept[t] / sum(p[t] * kept[t])`, `p = softmax(logits[t, allowed[t]])`; renormalising makes it equal to
    the softmax over the kept logits alone, which is what is computed. Ours (LLaVA-CMoE, arXiv 2503.21227, leaves the
    renormalisation open).

    Args:
        logits: [T, C] float32.
        allowed: [T, C] bool; a row may allow nothing, its weights are then all zero.
        k: [T] int64, experts to keep per row, >= 1; more than are allowed keeps all of them.
        k_max: the largest value in `k`.

    Returns:
        [T, C] float32; a row sums to 1, or to 0 where nothing is allowed.
    """
    masked = logits.masked_fill(~allowed, _NEVER)
    width = min(k_max, logits.shape[1])
    values, columns = masked.topk(width, dim=1)  # [T, K], largest first
    beyond = torch.arange(width, device=logits.device) >= k.unsqueeze(1)
    values = values.masked_fill(beyond, _NEVER)
    kept = torch.softmax(values, dim=1) * (values > _NEVER)
    return torch.zeros_like(logits).scatter(1, columns, kept)


def balance_loss(logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Load-balancing loss `E * sum_e f_e * P_e` of Switch Transformers (arXiv 2101.03961, eq. 4), 1 when balanced.

    Args:
        logits: [T, E], before the top-k.
        weights: [T, E], after it.

    Returns:
        scalar; `f_e` is the share of tokens' choices that fell on e, `P_e` the mean probability of e.
    """
    chosen = (weights > 0).float()
    share = chosen.sum(0) / chosen.sum().clamp(min=1)
    return logits.shape[1] * (share * torch.softmax(logits, dim=1).mean(0)).sum()
