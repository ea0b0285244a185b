"""Which resident units go first when room is needed.

It knows nothing of bytes in use or of who reserves what: the memory skips units that somebody reserves.
Read first: both orders are over the same events: a unit was used, a unit is gone. Both are walked lazily, so making
room costs what is passed on the way to what goes, not what is in memory.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from typing import Literal, Protocol

from runtime.memory.keys import UnitKey

EvictionName = Literal["lru", "gdsf"]


class Eviction(Protocol):
    """An order of eviction; every method is called under the memory's lock."""

    def used(self, key: UnitKey, *, num_bytes: int, load_s: float) -> None:
        """A unit was reserved, or has just become resident."""

    def gone(self, key: UnitKey, *, evicted: bool) -> None:
        """A unit is no longer resident."""

    def order(self) -> Iterator[UnitKey]:
        """All units, the first to go first; nothing may be used or go while this is walked."""


class LeastRecentlyUsed:
    """The unit that was used longest ago goes first."""

    def __init__(self) -> None:
        self._last: OrderedDict[UnitKey, None] = OrderedDict()

    def used(self, key: UnitKey, *, num_bytes: int, load_s: float) -> None:  # noqa: ARG002 - part of the interface
        """Note that nothing was used later."""
        self._last[key] = None
        self._last.move_to_end(key)

    def gone(self, key: UnitKey, *, evicted: bool) -> None:  # noqa: ARG002 - part of the interface
        """Forget it."""
        self._last.pop(key, None)

    def order(self) -> Iterator[UnitKey]:
        """Oldest use first."""
        return iter(self._last)


class GreedyDualSizeFrequency:
    """GDSF (Cherkasova, HPL-98-69): priority `L + uses * load_s / bytes`; the lowest goes first, and becomes L.

    Frequent, small and slowly loaded units stay; L ages those that were popular once.
    """

    def __init__(self) -> None:
        self._floor = 0.0
        self._count = 0
        self._uses: dict[UnitKey, int] = {}
        self._now: dict[UnitKey, tuple[float, int]] = {}  # (priority, when it got it)
        self._heap: list[tuple[float, int, UnitKey]] = []  # every entry of `_now`, among others that are void

    def used(self, key: UnitKey, *, num_bytes: int, load_s: float) -> None:
        """Raise its priority."""
        self._uses[key] = self._uses.get(key, 0) + 1
        self._count += 1
        self._now[key] = (self._floor + self._uses[key] * load_s / num_bytes, self._count)
        heapq.heappush(self._heap, (*self._now[key], key))
        if len(self._heap) > 2 * len(self._now) + 64:
            self._heap = [(*at, key) for key, at in self._now.items()]
            heapq.heapify(self._heap)

    def gone(self, key: UnitKey, *, evicted: bool) -> None:
        """Forget it; an eviction ages the others."""
        self._uses.pop(key, None)
        priority, _ = self._now.pop(key, (self._floor, 0))
        if evicted:
            self._floor = max(self._floor, priority)

    def order(self) -> Iterator[UnitKey]:
        """Lowest priority first; of equal ones the one that has had it for longest."""
        passed: list[tuple[float, int, UnitKey]] = []
        try:
            while self._heap:
                entry = heapq.heappop(self._heap)
                if self._now.get(entry[2]) == entry[:2]:
                    passed.append(entry)
                    yield entry[2]
        finally:
            for entry in passed:
                heapq.heappush(self._heap, entry)


def make_eviction(name: EvictionName) -> Eviction:
    """The order of this name."""
    return LeastRecentlyUsed() if name == "lru" else GreedyDualSizeFrequency()
