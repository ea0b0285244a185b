"""Slabs: a device's expert memory, in blocks for matrices of equal width and nearly equal rank.

It knows nothing of experts or tiers; it hands out [rank, width] views.
Read first: ranks are rounded up to a bucket (1, 2, 3, 4, 6, 8, 12, 16, 24, ...), at most a half more than needed and
never to the largest rank of all. A slab holds matrices of one (bucket, width); an empty slab gives its bytes back, so
buckets share the budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def bucket(rank: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is not below `rank`."""
    power = 1 << max(0, rank - 1).bit_length()
    return 3 * power // 4 if power >= 4 and rank <= 3 * power // 4 else power


@dataclass(frozen=True)
class Place:
    """Room for one matrix."""

    bucket: int
    width: int
    slab: int
    slot: int


class _Slab:
    def __init__(self, data: torch.Tensor) -> None:
        self.data = data  # [slots, bucket, width]
        self.free = list(range(data.shape[0] - 1, -1, -1))

    @property
    def empty(self) -> bool:
        return len(self.free) == self.data.shape[0]


class Slabs:
    """Allocates matrices.

    Args:
        budget_bytes: of all slabs.
        slab_bytes: of one at most, if that is a matrix or more.
        dtype: of what is stored.
        device: where.
    """

    def __init__(self, *, budget_bytes: int, slab_bytes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._slab_bytes = slab_bytes
        self._dtype = dtype
        self._device = device
        self._slabs: dict[tuple[int, int], dict[int, _Slab]] = {}
        self._count = 0

    def matrix_bytes(self, rank: int, width: int) -> int:
        """Bytes of a matrix in its bucket."""
        return bucket(rank) * width * self._dtype.itemsize

    def allocate(self, rank: int, width: int, *, more: int = 0) -> Place | None:
        """Room for a matrix; None where a new slab would exceed the budget.

        Args:
            rank: R.
            width: of a row.
            more: matrices of the same bucket and width that will be asked for next; a new slab is made for them too.
        """
        shape = (bucket(rank), width)
        slabs = self._slabs.setdefault(shape, {})
        number = next((number for number, slab in slabs.items() if slab.free), None)
        if number is None:
            number = self._new_slab(shape, 1 + more)
            if number is None:
                return None
        return Place(*shape, number, slabs[number].free.pop())

    def view(self, place: Place, rank: int) -> torch.Tensor:
        """The matrix in a place: [rank, width], contiguous."""
        return self._slabs[place.bucket, place.width][place.slab].data[place.slot, :rank]

    def free(self, place: Place) -> None:
        """Give room back; a slab that is empty then is gone, and every view into it void."""
        slabs = self._slabs[place.bucket, place.width]
        slab = slabs[place.slab]
        slab.free.append(place.slot)
        if slab.empty:
            self.used_bytes -= slab.data.nbytes
            del slabs[place.slab]

    def check_integrity(self) -> None:
        """Assert that no place is lost or given twice, and the budget is kept."""
        every = [slab for slabs in self._slabs.values() for slab in slabs.values()]
        assert self.used_bytes == sum(slab.data.nbytes for slab in every), "bytes of slabs drifted"
        assert self.used_bytes <= self.budget_bytes, "slabs exceed the budget"
        for slab in every:
            assert len(set(slab.free)) == len(slab.free), "a place is free twice"
            assert not slab.empty, "an empty slab is kept"

    def _new_slab(self, shape: tuple[int, int], wanted: int) -> int | None:
        one = shape[0] * shape[1] * self._dtype.itemsize
        slots = min(wanted, max(1, self._slab_bytes // one), (self.budget_bytes - self.used_bytes) // one)
        if slots < 1:
            return None
        self._count += 1
        data = torch.empty(slots, *shape, dtype=self._dtype, device=self._device)
        self._slabs[shape][self._count] = _Slab(data)
        self.used_bytes += data.nbytes
        return self._count
