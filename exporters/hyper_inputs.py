"""The slots of `onnx-model` for hyper-adapters in one layer: one adapter for every set of experts that can be chosen.

It does not know routers' weights, nor files.
Read first: an adapter depends on the layer and the chosen set alone, so it is made here, once, and fed as a constant.
A router of K experts per token chooses at most K of its E columns: `sum_k C(E, k)` sets, k from 1 to K.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain, combinations

import torch

from runtime.model.hyper import HyperExperts
from runtime.model.mixture import Mixture

MAX_SETS = 128
"""Sets of one mixture in one layer: 15 experts where a token chooses two, 128 where it chooses one."""


def hyper_refusal(mixture: Mixture) -> str | None:
    """Why a mixture's hyper-adapters cannot be fed; None where they can, or where there are none."""
    sizes = {} if mixture.hyper is None else mixture.hyper.sizes.experts
    num_sets = max((_num_sets(count, mixture.top_k) for count in sizes.values()), default=0)
    if num_sets <= MAX_SETS:
        return None
    return f"its router can choose {num_sets} sets of experts in a layer, and hyper-adapters have room for {MAX_SETS}"


def pack_hyper(layer: int, mixtures: Iterable[Mixture], width: int) -> dict[str, torch.Tensor]:
    """The adapters of a layer.

    Args:
        layer: its number.
        mixtures: in the order in which `exporters.router_inputs` gives them columns.
        width: D.

    Returns:
        by input name, without the dimension of layers: `hyper_sets` [H, C] bool, the columns of a set; `hyper_down`
        and `hyper_up` [S, D], `hyper_down_bias` [S], a row for each unit inside an adapter; `hyper_up_bias` [H, D];
        `hyper_spread` [H, S], 1 where row s is of set h. Where there is no adapter, one that adds nothing.
    """
    made: list[HyperExperts] = []
    columns: list[tuple[int, ...]] = []
    num_columns = 0
    for mixture in mixtures:
        router = mixture.routers.get(layer)
        if router is None:
            continue
        begin, num_columns = num_columns, num_columns + len(router.experts)
        if mixture.hyper is not None and layer in mixture.hyper.sizes.experts:
            for chosen in _sets(len(router.experts), mixture.top_k):
                made.append(mixture.hyper.adapter(layer, chosen))
                columns.append(tuple(begin + column for column in chosen))
    none = int(not made)
    owner = torch.tensor([h for h, one in enumerate(made) for _ in range(one.down.shape[2])] or [-1])
    sets = torch.zeros(max(1, len(made)), max(1, num_columns), dtype=torch.bool)
    for row, chosen in zip(sets, columns, strict=False):
        row[list(chosen)] = True
    return {
        "hyper_sets": sets,
        "hyper_down": torch.cat([*(one.down[0].t() for one in made), torch.zeros(none, width)]),
        "hyper_down_bias": torch.cat([*(one.down_bias[0] for one in made), torch.zeros(none)]),
        "hyper_up": torch.cat([*(one.up[0] for one in made), torch.zeros(none, width)]),
        "hyper_up_bias": torch.cat([*(one.up_bias for one in made), torch.zeros(none, width)]),
        "hyper_spread": (owner == torch.arange(len(sets)).unsqueeze(1)).float(),
    }


def _sets(num_experts: int, top_k: int) -> Iterable[tuple[int, ...]]:
    sizes = range(1, min(top_k, num_experts) + 1)
    return chain.from_iterable(combinations(range(num_experts), size) for size in sizes)


def _num_sets(num_experts: int, top_k: int) -> int:
    return sum(math.comb(num_experts, size) for size in range(1, top_k + 1))
