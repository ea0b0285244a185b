"""The device tier: experts in slabs, copied from host memory over pinned buffers on a stream of their own.

It knows nothing of disks; `runtime.memory.memory` calls all but `put` under its lock.
Read first: room is taken by `hold`, before anything is read, and evicts what nobody holds, least recently held first.
`put` copies on a loader thread and returns when the copy is complete, so whatever a reservation gets can be read by
kernels at once. Room is written to only after the kernels that were queued when it was taken: they may read what lay
there before (`runtime.memory.copying`).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.errors import BudgetError
from runtime.memory.copying import Copier, make_copier
from runtime.memory.keys import UnitKey
from runtime.memory.slabs import Place, Slabs, bucket
from runtime.memory.tier import HostTier, Tier
from runtime.memory.wanted import Held, Wanted
from runtime.model.expert import Expert, LowRank
from runtime.model.manifest import Target

_SLAB_BYTES = 4 << 20


@dataclass
class _Room:
    places: list[Place]
    holds: int = 0


class SlabTier:
    """Experts on one device.

    Args:
        budget_bytes: of all slabs.
        dtype: experts are stored in what the engine computes in.
        device: a CUDA device, or the CPU for tests.
        slab_bytes: of one slab.
        copier: how experts get there; None takes the device's.
    """

    def __init__(
        self,
        *,
        budget_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        slab_bytes: int = _SLAB_BYTES,
        copier: Copier | None = None,
    ) -> None:
        self._slabs = Slabs(budget_bytes=budget_bytes, slab_bytes=slab_bytes, dtype=dtype, device=device)
        self._rooms: OrderedDict[UnitKey, _Room] = OrderedDict()  # least recently held first
        self._copier = copier or make_copier(device, dtype)

    def check_fits(self, wanted: Sequence[Wanted]) -> None:
        """Raise BudgetError if even an empty device memory could not hold all of these."""
        needed = sum(self._slabs.matrix_bytes(rank, width) for one in wanted for rank, width in one.rows)
        if needed > self._slabs.budget_bytes:
            raise BudgetError(f"experts of {needed} bytes exceed the device memory of {self._slabs.budget_bytes} bytes")

    def hold(self, wanted: Sequence[Wanted], gone: list[UnitKey]) -> bool:
        """Take room for all of these, or for none; appends to `gone` what had to go for them."""
        new = [one for one in wanted if one.rows and one.key not in self._rooms]
        for one in wanted:
            if one.key in self._rooms:
                self._rooms[one.key].holds += 1
                self._rooms.move_to_end(one.key)
        shapes = [(rank, width) for one in new for rank, width in one.rows]
        places = self._allocate(shapes, gone)
        if places is None:
            for one in wanted:
                if one.key in self._rooms:
                    self._rooms[one.key].holds -= 1
            return False
        for one in new:
            self._rooms[one.key] = _Room([places.pop(0) for _ in one.rows], holds=1)
        if new:  # kernels that are queued may still read what lay there before
            self._copier.mark()
        return True

    def _allocate(self, shapes: Sequence[tuple[int, int]], gone: list[UnitKey]) -> list[Place] | None:
        left = Counter((bucket(rank), width) for rank, width in shapes)
        places: list[Place] = []
        for rank, width in shapes:
            left[bucket(rank), width] -= 1
            place = self._slabs.allocate(rank, width, more=left[bucket(rank), width])
            while place is None:
                idle = next((key for key, room in self._rooms.items() if not room.holds), None)
                if idle is None:
                    for taken in places:
                        self._slabs.free(taken)
                    return None
                self.forget(idle)
                gone.append(idle)
                place = self._slabs.allocate(rank, width, more=left[bucket(rank), width])
            places.append(place)
        return places

    def claim(self, wanted: Wanted) -> bool:
        """Hold one thing once more if it has room here; what has no matrices needs none."""
        room = self._rooms.get(wanted.key)
        if room is not None:
            room.holds += 1
        return room is not None or not wanted.rows

    def let_go(self, key: UnitKey) -> None:
        """End one `hold` or `claim`."""
        room = self._rooms.get(key)
        if room is not None:
            room.holds -= 1

    def forget(self, key: UnitKey) -> None:
        """Drop a thing that nobody holds."""
        room = self._rooms.pop(key, None)
        if room is not None:
            assert not room.holds, f"{key} is held"
            for place in room.places:
                self._slabs.free(place)

    def put(self, key: UnitKey, value: Held) -> Held:
        """Copy an expert into its room, which the caller has claimed; returns it as it lies there."""
        if not isinstance(value, Expert):
            return value
        places = iter(self._rooms[key].places)
        updates: dict[Target, LowRank] = {}
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        for target in sorted(value.updates):
            update = value.updates[target]
            a, b = (self._slabs.view(next(places), update.rank) for _ in range(2))
            copies += [(a, update.a), (b, update.b.t())]
            updates[target] = LowRank(a, b.t())
        self._copier.copy(copies)
        return Expert(layer=value.layer, scale=value.scale, updates=updates)

    def check_integrity(self) -> None:
        """Assert that no hold is negative and the slabs are whole."""
        assert all(room.holds >= 0 for room in self._rooms.values()), "let go more often than held"
        self._slabs.check_integrity()


def make_tier(device: torch.device, dtype: torch.dtype, budget_bytes: int) -> Tier:
    """The tier of a device: host memory itself on a CPU, slabs of `dtype` elsewhere."""
    if device.type == "cpu":
        return HostTier()
    return SlabTier(budget_bytes=budget_bytes, dtype=dtype, device=device)
