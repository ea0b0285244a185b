"""What a mixture does on examples that do not train it: its loss, and how often each expert is chosen.

It does not know tasks, policies or optimisers.
Read first: batches run in order of length, so that one list of examples always gives one result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from runtime.model.attach import MixtureFFN, attached
from runtime.model.base import BaseModel
from training.batches import Row, collate
from training.steps import answer_loss


def held_out_loss(
    base: BaseModel, ffns: Mapping[int, MixtureFFN], rows: Sequence[Row], *, batch_size: int
) -> tuple[float, dict[int, torch.Tensor]]:
    """`attached_loss` with `ffns` attached to `base` meanwhile."""
    with attached(base.model, ffns):
        return attached_loss(base, ffns, rows, batch_size=batch_size)


@torch.no_grad()
def attached_loss(
    base: BaseModel, ffns: Mapping[int, MixtureFFN], rows: Sequence[Row], *, batch_size: int
) -> tuple[float, dict[int, torch.Tensor]]:
    """Mean cross-entropy of all answer tokens of `rows`, in nats, and the experts' frequencies.

    Args:
        base: with `ffns` attached.
        ffns: layer -> mixture.
        rows: at least one.
        batch_size: rows per forward pass.

    Returns:
        the loss, and for every layer [E]: the share of real tokens whose `min(K, E - 1)` largest weights hold the
        expert. With E <= K every expert is always chosen, which would say nothing (ours); E = 1 gives 1.
    """
    ordered = sorted(rows, key=lambda row: (row.num_tokens, row.prompt, row.answer))
    chosen = {layer: torch.zeros(len(ffn.experts)) for layer, ffn in ffns.items()}
    loss, num_answer_tokens, num_tokens = 0.0, 0, 0
    for start in range(0, len(ordered), batch_size):
        batch = collate(ordered[start : start + batch_size], base.model.device)
        loss += float(answer_loss(base, batch)) * len(batch.targets)
        num_answer_tokens += len(batch.targets)
        real = batch.real.flatten()
        num_tokens += int(real.sum())
        for layer, ffn in ffns.items():
            chosen[layer] += _choices(ffn.weights[real], ffn.top_k).cpu()
    return loss / num_answer_tokens, {layer: counts / num_tokens for layer, counts in chosen.items()}


def _choices(weights: torch.Tensor, top_k: int) -> torch.Tensor:
    """[T, E] -> [E]: how many tokens hold the expert among their largest weights."""
    k = max(1, min(top_k, weights.shape[1] - 1))
    columns = weights.topk(k, dim=1).indices
    return torch.zeros_like(weights).scatter(1, columns, 1.0).mul(weights > 0).sum(0)
