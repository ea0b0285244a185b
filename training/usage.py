"""How a trained router shares its weight among the experts: what a server reads first when it reads a layer.

It does not know repertoires; `training.publish` stores the shares beside the router.
Read first: shares decide an order of reads and nothing else, so a sample of the examples is enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from runtime.model.attach import MixtureFFN, attached
from runtime.model.base import BaseModel
from training.batches import Row, collate

_ROWS = 64
_DIGITS = 4  # enough for an order; more would differ from machine to machine

Usage = Mapping[int, tuple[float, ...]]
"""Layer -> share of the router's weight on each of its columns; they sum to 1 but for rounding."""


@torch.no_grad()
def router_usage(base: BaseModel, ffns: Mapping[int, MixtureFFN], rows: Sequence[Row], *, batch_size: int) -> Usage:
    """`u[e] = sum_t w[t, e] / sum_t sum_e' w[t, e']` over the real tokens t of at most 64 rows (ours).

    Args:
        base: frozen; as before afterwards.
        ffns: layer -> trained mixture.
        rows: examples, at least one; evenly spaced ones are taken.
        batch_size: rows per forward pass.
    """
    sample = rows[:: -(-len(rows) // _ROWS)]
    sums = {layer: torch.zeros(len(ffn.experts), dtype=torch.float64) for layer, ffn in ffns.items()}
    with attached(base.model, ffns):
        for start in range(0, len(sample), batch_size):
            batch = collate(sample[start : start + batch_size], base.model.device)
            base.model.base_model(input_ids=batch.ids, use_cache=False)
            for layer, ffn in ffns.items():
                sums[layer] += ffn.weights[batch.real.flatten()].sum(0).double().cpu()
    return {
        layer: tuple(round(share, _DIGITS) for share in (total / total.sum()).tolist()) for layer, total in sums.items()
    }
