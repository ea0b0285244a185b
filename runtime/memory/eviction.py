"""Which resident units go first when room is needed.

It knows nothing of bytes in use or of who reserves what: the memory offers only units that nobody reserves.
Read first: both orders are over the same events: a unit was used, a unit is gone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Protocol

from runtime.memory.keys import UnitKey

EvictionName = Literal["lru", "gdsf"]


class Eviction(Protocol):
    """An order of eviction; every method is called under the memory's lock."""

    def used(self, key: UnitKey, *, num_bytes: int, load_s: float) -> None:
        """A unit was reserved, or has just become resident."""

    def gone(self, key: UnitKey, *, evicted: bool) -> None:
        """A unit is no longer resident."""

    def order(self, keys: Iterable[UnitKey]) -> list[UnitKey]:
        """The same keys, the first to go first."""


class LeastRecentlyUsed:
    """The unit that was used longest ago goes first."""

    def __init__(self) -> None:
        self._clock = 0
        self._last: dict[UnitKey, int] = {}

    def used(self, key: UnitKey, *, num_bytes: int, load_s: float) -> None:  # noqa: ARG002 - part of the interface
        """Note the time."""
        self._clock += 1
        self._last[key] = self._clock

    def gone(self, key: UnitKey, *, evicted: bool) -> None:  # noqa: ARG002 - part of the interface
        """Forget it."""
        self._last.pop(key, None)

    def order(self, keys: Iterable[UnitKey]) -> list[UnitKey]:
        """Oldest use first."""
        return sorted(keys, key=lambda key: self._last.get(key, 0))


class GreedyDualSizeFrequency:
    """GDSF (Cherkasova, HPL-98-69): priority `L + uses * load_s / bytes`; the lowest goes first, and becomes L.

    Frequent, small and slowly loaded units stay; L ages those that were popular once.
    """

    def __init__(self) -> None:
        self._floor = 0.0
        self._uses: dict[UnitKey, int] = {}
        self._priority: dict[UnitKey, float] = {}

    def used(self, key: UnitKey, *, num_bytes: int, load_s: float) -> None:
        """Raise its priority."""
        self._uses[key] = self._uses.get(key, 0) + 1
        self._priority[key] = self._floor + self._uses[key] * load_s / num_bytes

    def gone(self, key: UnitKey, *, evicted: bool) -> None:
        """Forget it; an eviction ages the others."""
        self._uses.pop(key, None)
        priority = self._priority.pop(key, self._floor)
        if evicted:
            self._floor = max(self._floor, priority)

    def order(self, keys: Iterable[UnitKey]) -> list[UnitKey]:
        """Lowest priority first."""
        return sorted(keys, key=lambda key: self._priority.get(key, 0.0))


def make_eviction(name: EvictionName) -> Eviction:
    """The order of this name."""
    return LeastRecentlyUsed() if name == "lru" else GreedyDualSizeFrequency()
