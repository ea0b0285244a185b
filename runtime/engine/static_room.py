"""How much room a layer's static pack has: what it holds when it is filled, rounded up so that it seldom grows.

It knows nothing of tensors' values.
Read first: room only grows. Whatever some pack has once needed stays, and is filled with what changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runtime.engine.stage import StagedLayer
from runtime.engine.staged_kernels import most_experts
from runtime.kernels.triton_mixture import RANK_BUCKETS
from runtime.model.manifest import Target

_LEAST = 8
_LEAST_ROWS = 16  # every linear's part begins at an aligned address, and there is an expert for either end of a bucket


@dataclass(frozen=True, kw_only=True)
class Room:
    """Sizes of one layer's static pack.

    Args:
        columns: C, of the router.
        parts: 1 + N, of the router.
        experts: packed.
        k_max: columns that a part keeps at most; 0 where none keeps the largest.
        k_most: experts of a token at most.
        groups: G; 0 where no part is grouped.
        blends: P, parts of a mixture; 0 where every mixture is one part.
        bias: whether the router has a bias; `absolute` and `constant` likewise.
        absolute: see `StagedRouter`.
        constant: likewise.
        linears: of each linear that an expert updates its packed rows, its input's width and its output's.
        largest: the highest rank of an expert there.
    """

    columns: int
    parts: int
    experts: int
    k_max: int
    k_most: int
    groups: int
    blends: int
    bias: bool
    absolute: bool
    constant: bool
    linears: Mapping[Target, tuple[int, int, int]]
    largest: int

    def joined(self, other: Room) -> Room:
        """Room for what either holds."""
        own, others = vars(self), vars(other)
        most = {name: max(own[name], others[name]) for name in own if name != "linears"}
        linears = {**self.linears, **other.linears}
        for target in self.linears.keys() & other.linears.keys():
            linears[target] = max(self.linears[target], other.linears[target])
        return Room(linears=linears, **most)

    def spanning_ranks(self) -> tuple[int, ...]:
        """Ranks, one per expert, that stand for all up to the largest: kernels run for every bucket of these.

        How many rows an expert really has, kernels read from a table.
        """
        ranks = {1, self.largest}
        for bucket in RANK_BUCKETS:
            ranks |= {min(bucket, self.largest), min(bucket + 1, self.largest)}
        assert len(ranks) <= self.experts, "two for each bucket"
        return (*sorted(ranks), *(self.largest for _ in range(self.experts - len(ranks))))


def room_for(staged: StagedLayer) -> Room:
    """Room for a pack, and for somewhat more."""
    router, largest = staged.router, 1
    linears: dict[Target, tuple[int, int, int]] = {}
    for update in staged.updates.values():
        for target, (begin, end, b) in update.b.items():
            linears[target] = rounded(end - begin, least=_LEAST_ROWS), update.a.shape[1], b.shape[1]
            owners = update.owners[begin:end]
            largest = max(largest, *map(owners.count, set(owners)))
    return Room(
        columns=rounded(len(router.columns)),
        parts=rounded(len(router.chosen)),
        experts=rounded(len(staged.experts), least=_LEAST_ROWS),
        k_max=router.k_max,
        k_most=most_experts(router),
        groups=0 if router.groups is None else rounded(len(router.groups.bias)),
        blends=0 if router.blends is None else router.blends.parts.shape[1],
        bias=router.bias is not None,
        absolute=router.absolute is not None,
        constant=router.constant is not None,
        linears=linears,
        largest=rounded(largest),
    )


def rounded(count: int, *, least: int = _LEAST) -> int:
    """The next power of two."""
    return max(least, 1 << max(0, count - 1).bit_length())
