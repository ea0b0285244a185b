"""The stage: the experts and routers of all running mixtures, packed per layer for the step.

It knows nothing of sequences or memory tiers; it is built from mixtures and their reserved experts.
Read first: a layer is packed when a step first enters it, and again only when the set of mixtures there has changed; so
a stage can exist while experts of later layers are still being read. An expert that several mixtures see is packed
once; every mixture keeps its own router columns (`runtime.engine.staged_router`). Row 0 is the plain base model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch

from runtime.engine.staged_hyper import StagedHyper, stage_hyper
from runtime.engine.staged_kernels import KernelColumns, KernelUpdate, kernel_columns, kernel_update
from runtime.engine.staged_router import StagedColumn, StagedRouter, stage_router
from runtime.kernels.mixture import shrink
from runtime.model.expert import Expert
from runtime.model.manifest import ATTENTION_TARGETS, Target
from runtime.model.mixture import Mixture

FetchExpert = Callable[[str, int], Expert]

INPUTS: tuple[tuple[Target, ...], ...] = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
"""The linears of a layer, those together that read the same input."""


@dataclass(frozen=True)
class StagedUpdate:
    """The updates of the linears that read one input, packed along the rank.

    Args:
        a: [S, in], the rows of all A, of one linear after the other.
        b: per linear the first of its rows, the one behind its last, and the columns of its `scale * B` as rows [*, H].
        owners: digest of the expert of every row, S of them.
        spread: [C, S] float32, 1 where column c scores the expert that owns row s.
    """

    a: torch.Tensor
    b: Mapping[Target, tuple[int, int, torch.Tensor]]
    owners: tuple[str, ...]
    spread: torch.Tensor

    def shrink(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`(A x)` times the weights of the rows' experts: x [T, in], weights [T, C] -> [T, S], in the dtype of x."""
        return shrink(x, self.a, weights @ self.spread)

    def expand(self, target: Target, y: torch.Tensor, shrunk: torch.Tensor) -> None:
        """Add the update of one linear to its output `y` [T, H], in place; nothing where no expert has one."""
        if target in self.b:
            begin, end, b = self.b[target]
            y.addmm_(shrunk[:, begin:end], b)


@dataclass(frozen=True)
class StagedLayer:
    """One layer: C router columns over the packed experts.

    Args:
        router: of all mixtures.
        experts: digest -> what is packed, each once, in the order of packing.
        updates: for every entry of `INPUTS` that an expert updates.
        hyper: adapters beside the FFN; None where no mixture has any.
    """

    router: StagedRouter
    experts: Mapping[str, Expert]
    updates: Mapping[tuple[Target, ...], StagedUpdate]
    hyper: StagedHyper | None

    @property
    def columns(self) -> tuple[StagedColumn, ...]:
        """Which mixture and expert every column belongs to."""
        return self.router.columns

    @property
    def attends(self) -> bool:
        """Whether an expert updates the attention of this layer."""
        return any(target in ATTENTION_TARGETS for inputs in self.updates for target in inputs)

    @cached_property
    def kernel_columns(self) -> KernelColumns:
        """The router's columns as the GPU's kernels read them; made when they are first launched."""
        return kernel_columns(self.router, tuple(self.experts), self.router.weight.device)

    @cached_property
    def kernel_updates(self) -> Mapping[Target, KernelUpdate]:
        """The updates as the GPU's kernels read them, on the same memory."""
        return {
            target: kernel_update(update.a[begin:end], b, update.owners[begin:end], tuple(self.experts))
            for update in self.updates.values()
            for target, (begin, end, b) in update.b.items()
        }


class LayerPacks:
    """The newest pack of every layer, kept from step to step.

    Args:
        dtype: of the packed experts.
        device: where they live.
    """

    def __init__(self, *, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._packs: dict[int, tuple[tuple[str, ...], StagedLayer]] = {}

    def pack(self, layer: int, mixtures: Sequence[tuple[Mixture, FetchExpert]]) -> StagedLayer:
        """The mixtures' experts in this layer, packed in this order; all of them must be in memory."""
        names = tuple(mixture.digest for mixture, _ in mixtures)
        held = self._packs.get(layer)
        if held is not None and held[0] == names:
            return held[1]
        self._packs.pop(layer, None)  # before the next is made: never two of a layer
        made = _stage_layer(layer, mixtures, held[1] if held else None, self.dtype, self.device)
        self._packs[layer] = (names, made)
        return made


class Packs(Protocol):
    """Where a stage has its layers from."""

    def pack(self, layer: int, mixtures: Sequence[tuple[Mixture, FetchExpert]]) -> StagedLayer:
        """The mixtures' experts in this layer, packed in this order; all of them must be in memory."""


class _Layers(Mapping[int, StagedLayer]):
    """Layer -> its pack, made when asked for."""

    def __init__(self, mixtures: Sequence[tuple[Mixture, FetchExpert]], packs: Packs) -> None:
        self._mixtures = mixtures
        self._packs = packs
        self._keys = frozenset(layer for mixture, _ in mixtures for layer in mixture.routers)

    def __getitem__(self, layer: int) -> StagedLayer:
        if layer not in self._keys:
            raise KeyError(layer)
        return self._packs.pack(layer, self._mixtures)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._keys))

    def __len__(self) -> int:
        return len(self._keys)


class Stage:
    """Mixtures that are running in a range of layers.

    Args:
        mixtures: distinct mixtures, each with the way to its reserved experts.
        packs: makes what is packed, and keeps it.

    `layers` maps a layer to its pack, which is made when it is first asked for; row i + 1 is `mixtures[i]`.
    """

    def __init__(self, mixtures: Sequence[tuple[Mixture, FetchExpert]], packs: Packs) -> None:
        self.mixtures = tuple(mixtures)
        self.rows = {mixture.digest: 1 + i for i, (mixture, _) in enumerate(mixtures)}
        self.layers: Mapping[int, StagedLayer] = _Layers(mixtures, packs)

    def row(self, mixture: Mixture | None) -> int:
        """The row of a mixture, 0 for the plain base model."""
        return 0 if mixture is None else self.rows[mixture.digest]


def _stage_layer(
    layer: int,
    mixtures: Sequence[tuple[Mixture, FetchExpert]],
    held: StagedLayer | None,
    dtype: torch.dtype,
    device: torch.device,
) -> StagedLayer:
    """Pack a layer; where `held` has the same experts in the same order, only the routers are packed anew."""
    experts: dict[str, Expert] = {}
    for mixture, fetch in mixtures:
        if layer in mixture.routers:
            for digest in mixture.routers[layer].experts:
                if digest not in experts:
                    experts[digest] = fetch(digest, layer)
    router = stage_router(layer, [mixture for mixture, _ in mixtures], device)
    hyper = stage_hyper(layer, router, [mixture for mixture, _ in mixtures])
    if held is not None and tuple(held.experts) == tuple(experts):
        again = {
            inputs: replace(update, spread=_spread(experts, router.columns, update.owners).to(device))
            for inputs, update in held.updates.items()
        }
        return StagedLayer(router, held.experts, again, hyper)
    updates = {}
    for inputs in INPUTS:
        if any(target in expert.updates for expert in experts.values() for target in inputs):
            updates[inputs] = _pack(inputs, experts, router.columns, dtype, device)
    return StagedLayer(router, experts, updates, hyper)


def _pack(
    inputs: Sequence[Target],
    experts: Mapping[str, Expert],
    columns: Sequence[StagedColumn],
    dtype: torch.dtype,
    device: torch.device,
) -> StagedUpdate:
    a: list[torch.Tensor] = []
    owners: list[str] = []
    b: dict[Target, tuple[int, int, torch.Tensor]] = {}
    for target in inputs:
        begin, parts = len(owners), []
        for digest, expert in experts.items():
            if target in expert.updates:
                update = expert.updates[target]
                a.append(update.a.to(device, dtype))
                parts.append((update.b.t().float() * expert.scale).to(device, dtype))
                owners += [digest] * update.rank
        if parts:
            b[target] = (begin, len(owners), torch.cat(parts))
    return StagedUpdate(torch.cat(a), b, tuple(owners), _spread(experts, columns, owners).to(device))


def _spread(experts: Mapping[str, Expert], columns: Sequence[StagedColumn], owners: Sequence[str]) -> torch.Tensor:
    order = {digest: place for place, digest in enumerate(experts)}
    owner = torch.tensor([order[digest] for digest in owners])
    scored = torch.tensor([order[column.expert] for column in columns])
    return (scored.unsqueeze(1) == owner).float()
