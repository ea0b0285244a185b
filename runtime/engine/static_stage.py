"""Packed layers that stay where they are: what `runtime.engine.stage` packs, copied into memory that later packs reuse.

It knows nothing of steps or of what is recorded of them.
Read first: a seat is a `StagedLayer` of fixed shapes whose spare columns, parts and rows change no result. Filling it
leaves every address as it was, until a pack needs more room; then the seat is made anew, and counts up its version.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from runtime.engine.stage import INPUTS, FetchExpert, LayerPacks, StagedLayer, StagedUpdate
from runtime.engine.staged_kernels import KernelColumns, KernelUpdate
from runtime.engine.staged_router import StagedGroups, StagedParts, StagedRouter
from runtime.engine.static_room import Room, room_for
from runtime.kernels.mixture import PackedUpdate
from runtime.kernels.triton_mixture import ExpertRows
from runtime.model.manifest import Target
from runtime.model.mixture import Mixture


@dataclass(frozen=True)
class SeatedLayer(StagedLayer):
    """A staged layer of fixed shapes; its tables for kernels are filled with it. It names no experts or columns.

    Args:
        columns_table: see `StagedLayer.kernel_columns`.
        update_tables: see `StagedLayer.kernel_updates`.
        weights: [rows of a step at most, C], room for what the router gives.
    """

    columns_table: KernelColumns
    update_tables: Mapping[Target, KernelUpdate]
    weights: torch.Tensor

    @cached_property
    def kernel_columns(self) -> KernelColumns:
        """See `StagedLayer`."""
        return self.columns_table

    @cached_property
    def kernel_updates(self) -> Mapping[Target, KernelUpdate]:
        """See `StagedLayer`."""
        return self.update_tables


class Seat:
    """The memory of one layer.

    Args:
        room: of the memory.
        layer: the memory itself.
        version: nothing that was made for another version may be used with this.
    """

    def __init__(self, room: Room, layer: SeatedLayer, version: int) -> None:
        self.room, self.layer, self.version = room, layer, version
        self._held: weakref.ref[StagedLayer] | None = None
        self._packed: dict[tuple[Target, ...], weakref.ref[torch.Tensor]] = {}

    def holds(self, staged: StagedLayer) -> bool:
        """Whether it was filled with this pack last."""
        return self._held is not None and self._held() is staged

    def fill(self, staged: StagedLayer) -> None:
        """Hold a pack for which there is room; experts are not copied again that lie here already."""
        _fill_router(self.layer.router, staged.router)
        columns = staged.kernel_columns
        _put(self.layer.columns_table.experts, columns.experts)
        for inputs, update in self.layer.updates.items():
            self._fill_update(inputs, update, staged)
        self._held = weakref.ref(staged)

    def _fill_update(self, inputs: tuple[Target, ...], update: StagedUpdate, staged: StagedLayer) -> None:
        found = staged.updates.get(inputs)
        update.spread.zero_()
        for target, (begin, _, _) in update.b.items():
            if found is not None and target in found.b:
                first, last, _ = found.b[target]
                rows = slice(begin, begin + last - first)
                update.spread[: len(found.spread), rows] = found.spread[:, first:last]
        held = self._packed.get(inputs)
        if found is not None and held is not None and held() is found.a:
            return
        for target, (begin, end, b) in update.b.items():
            first, last, new = (0, 0, b[:0]) if found is None else found.b.get(target, (0, 0, b[:0]))
            _put(update.a[begin:end], update.a[:0] if found is None else found.a[first:last])
            _put(b, new)
            owners = () if found is None else found.owners[first:last]
            ends = torch.tensor([0, *(owners.count(digest) for digest in staged.experts)]).cumsum(0)
            rows_table = self.layer.update_tables[target].rows.rows
            padded = torch.full((len(rows_table),), int(ends[-1]), dtype=torch.int32)
            padded[: len(ends)] = ends
            rows_table.copy_(padded)
        if found is None:
            self._packed.pop(inputs, None)
        else:
            self._packed[inputs] = weakref.ref(found.a)


class StaticPacks:
    """The newest pack of every layer, seated.

    Args:
        packs: makes what is seated.
        num_rows: of a step at most.
    """

    def __init__(self, packs: LayerPacks, *, num_rows: int) -> None:
        self.packs = packs
        self._num_rows = num_rows
        self._seats: dict[int, Seat] = {}

    def pack(self, layer: int, mixtures: Sequence[tuple[Mixture, FetchExpert]]) -> StagedLayer:
        """What `LayerPacks.pack` gives, seated; hyper-adapters are left out."""
        staged = self.packs.pack(layer, mixtures)
        seat = self._seats.get(layer)
        if seat is not None and seat.holds(staged):
            return seat.layer
        room = room_for(staged) if seat is None else seat.room.joined(room_for(staged))
        if seat is None or room != seat.room:
            version = 1 if seat is None else seat.version + 1
            self._seats.pop(layer, None)
            seat = None  # the smaller one goes before the larger is made
            seat = self._seats[layer] = Seat(room, self._allocate(room, staged), version)
        seat.fill(staged)
        return seat.layer

    def version(self, layer: int) -> int:
        """Of a layer's memory; it counts up when that has moved."""
        return self._seats[layer].version

    def weights(self, layer: int) -> torch.Tensor:
        """Room for the weights [T, C] of a step in a layer."""
        return self._seats[layer].layer.weights

    def _allocate(self, room: Room, staged: StagedLayer) -> SeatedLayer:
        width, packs = staged.router.weight.shape[1], self.packs
        return _allocate(room, self._num_rows, width, packs.dtype, packs.device)


def _allocate(room: Room, num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> SeatedLayer:
    """Memory for one layer and `num_rows` tokens; `width` is D."""

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    groups = StagedGroups(
        weight=zeros(room.groups, width),
        bias=zeros(room.groups),
        allowed=zeros(room.parts, room.groups, dtype=torch.bool),
        columns=zeros(room.parts, room.columns, dtype=torch.bool),
        member=zeros(room.columns, dtype=torch.int64),
        share=zeros(room.parts),
        epsilon=zeros(room.parts),
    )
    blends = StagedParts(zeros(room.parts, room.blends, dtype=torch.int64), zeros(room.parts, room.blends))
    router = StagedRouter(
        columns=(),
        rows=(),
        weight=zeros(room.columns, width),
        bias=zeros(room.columns) if room.bias else None,
        chosen=zeros(room.parts, room.columns, dtype=torch.bool),
        top_k=zeros(room.parts, dtype=torch.int64),
        k_max=room.k_max,
        absolute=zeros(room.columns, dtype=torch.bool) if room.absolute else None,
        constant=zeros(room.parts, room.columns) if room.constant else None,
        groups=groups if room.groups else None,
        blends=blends if room.blends else None,
    )
    updates: dict[tuple[Target, ...], StagedUpdate] = {}
    tables: dict[Target, KernelUpdate] = {}
    ranks = room.spanning_ranks()
    for inputs in INPUTS:
        own = [target for target in inputs if target in room.linears]
        total = sum(room.linears[target][0] for target in own)
        if not total:
            continue
        a, begin = zeros(total, room.linears[own[0]][1], dtype=dtype), 0
        b: dict[Target, tuple[int, int, torch.Tensor]] = {}
        for target in own:
            rows, _, height = room.linears[target]
            end = begin + rows
            b[target] = (begin, end, zeros(rows, height, dtype=dtype))
            packed = PackedUpdate(a[begin:end], b[target][2], owner=zeros(0, dtype=torch.int64))  # kernels read `rows`
            tables[target] = KernelUpdate(ExpertRows(packed, ranks, zeros(room.experts + 1, dtype=torch.int32)))
            begin = end
        updates[inputs] = StagedUpdate(a, b, (), zeros(room.columns, total))
    columns = KernelColumns(zeros(room.columns, dtype=torch.int64), room.experts, room.k_most)
    return SeatedLayer(router, {}, updates, None, columns, tables, zeros(num_rows, room.columns))


def _fill_router(seated: StagedRouter, router: StagedRouter) -> None:
    _put(seated.weight, router.weight)
    _put(seated.chosen, router.chosen)
    _put(seated.top_k, router.top_k, rest=1)
    for room, found in (
        (seated.bias, router.bias),
        (seated.absolute, router.absolute),
        (seated.constant, router.constant),
    ):
        if room is not None:
            _put(room, room[:0] if found is None else found)
    if seated.groups is not None:
        for name, room in vars(seated.groups).items():
            _put(room, room[:0] if router.groups is None else getattr(router.groups, name))
    if seated.blends is not None:
        if router.blends is not None:
            _put(seated.blends.parts, router.blends.parts)
            _put(seated.blends.shares, router.blends.shares)
        else:  # every mixture is its own part
            count = len(seated.blends.parts)
            _put(seated.blends.parts, torch.arange(count, device=seated.blends.parts.device).unsqueeze(1))
            _put(seated.blends.shares, seated.blends.shares.new_ones(count, 1))


def _put(room: torch.Tensor, found: torch.Tensor, *, rest: int = 0) -> None:
    """Copy into the first places of every dimension, and fill what is left."""
    room.fill_(rest)
    room[tuple(map(slice, found.shape))] = found
