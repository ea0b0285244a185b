"""The hyper-adapters of a mixture as they are served: one per (layer, chosen set), made once and kept.

It does not know how the experts of a set were chosen, nor how the hypernetwork was trained.
Read first: with one expert per token all sets are known, so the whole table is written when a task is published and the
hypernetwork is dropped (`kind="table"`); with more, a set's adapter is made when a token first chooses it.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from runtime.model.hyper import HyperExperts, HyperSizes, Weights, generate, hyper_shapes

HyperKind = Literal["network", "table"]

_PARTS = ("down", "down_bias", "up", "up_bias")
_KEPT_SETS = 512

SetKey = tuple[int, tuple[int, ...], int]
"""Layer, chosen columns ascending, generation."""


def distinct_sets(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The different rows of `chosen` [T, E] bool, [S, E], and which of them every token has, [T] int64."""
    sets, which = torch.unique(chosen, dim=0, return_inverse=True)
    return sets, which


def table_shapes(sizes: HyperSizes) -> dict[str, tuple[int, ...]]:
    """Tensors of a table: per layer E adapters, the e-th for the set {e}."""
    D, b = sizes.width, sizes.bottleneck
    parts = {"down": (D, b), "down_bias": (b,), "up": (b, D), "up_bias": (D,)}
    return {
        _table_name(layer, part): (num_experts, *parts[part])
        for layer, num_experts in sizes.experts.items()
        for part in _PARTS
    }


@torch.no_grad()
def full_table(weights: Weights, sizes: HyperSizes) -> dict[str, torch.Tensor]:
    """Every adapter of a top-1 router; tensors as in `table_shapes`."""
    table: dict[str, torch.Tensor] = {}
    for layer, num_experts in sizes.experts.items():
        made = generate(weights, sizes, layer, torch.eye(num_experts, dtype=torch.bool))
        table |= {_table_name(layer, part): getattr(made, part).contiguous() for part in _PARTS}
    return table


def stored_shapes(kind: HyperKind, sizes: HyperSizes) -> dict[str, tuple[int, ...]]:
    """What a blob of this kind holds."""
    return hyper_shapes(sizes) if kind == "network" else table_shapes(sizes)


@dataclass(frozen=True)
class Hyper:
    """The hyper-adapters of one task's mixture; safe for several threads.

    Args:
        kind: what `weights` are.
        sizes: of the hypernetwork; E of a layer is the number of its router's columns.
        weights: tensors as in `stored_shapes`.
        generation: part of the key under which an adapter is kept.
    """

    kind: HyperKind
    sizes: HyperSizes
    weights: Weights
    generation: int
    _kept: OrderedDict[SetKey, HyperExperts] = field(default_factory=OrderedDict, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, layer: int, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """What the adapters add to the FFN's output: x [T, D], chosen [T, E] bool -> [T, D] float32; 0 without layer.

        A token that chose nothing gets nothing.
        """
        if layer not in self.sizes.experts or not len(x):
            return torch.zeros(x.shape, device=x.device)
        sets, which = distinct_sets(chosen)
        made = [self.adapter(layer, tuple(row.nonzero()[:, 0].tolist())) for row in sets]
        stacked = HyperExperts(*(torch.cat([getattr(one, part) for one in made]).to(x.device) for part in _PARTS))
        return stacked.apply(x, which) * chosen.any(1, keepdim=True)

    def adapter(self, layer: int, chosen: tuple[int, ...]) -> HyperExperts:
        """The adapter of one set of columns, ascending; S = 1."""
        key = (layer, chosen, self.generation)
        with self._lock:
            held = self._kept.get(key)
            if held is not None:
                self._kept.move_to_end(key)
                return held
        made = self._make(layer, chosen)
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > _KEPT_SETS:
                self._kept.popitem(last=False)
        return made

    @torch.no_grad()
    def _make(self, layer: int, chosen: tuple[int, ...]) -> HyperExperts:
        if self.kind == "table":
            at = slice(chosen[0], chosen[0] + 1) if chosen else slice(0, 1)
            return HyperExperts(*(self.weights[_table_name(layer, part)][at] for part in _PARTS))
        row = torch.zeros(1, self.sizes.experts[layer], dtype=torch.bool)
        row[0, list(chosen)] = True
        return generate(self.weights, self.sizes, layer, row)


def num_parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Numbers in all tensors of these shapes."""
    return sum(math.prod(shape) for shape in shapes.values())


def _table_name(layer: int, part: str) -> str:
    return f"layer.{layer:04d}.{part}"
