"""What the expert memory counts, and the immutable snapshot that it shows.

It knows nothing of slots or locks.
Read first: counters only grow; precision and recall of guesses follow from them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class Counters:
    """Since the start; changed under the memory's lock. Bytes and seconds are in the names."""

    hits: int = 0
    misses: int = 0
    loads: int = 0
    evictions: int = 0
    failures: int = 0
    bytes_read: int = 0
    load_s: float = 0.0
    prefetch_useful_bytes: int = 0
    prefetch_wasted_bytes: int = 0
    demanded_bytes: int = 0

    def snapshot(self, **now: int) -> MemoryStatistics:
        """The counters, with what is resident now."""
        return MemoryStatistics(**now, **asdict(self))


@dataclass(frozen=True, kw_only=True)
class MemoryStatistics:
    """Counters since the start, and what is resident now.

    Args:
        budget_bytes: of expert tensors.
        resident_bytes: held now.
        reserved_bytes: promised to running sequences, loaded or not.
        resident_units: (layer, expert) pairs held now.
        hits: units that were resident when they were reserved.
        misses: units that were not.
        loads: units read, checked and accepted.
        evictions: units that had to go.
        failures: units that could not be read.
        bytes_read: by all loads.
        load_s: seconds in loads.
        prefetch_useful_bytes: read, or being read, because of a guess, and then reserved.
        prefetch_wasted_bytes: read because of a guess and gone before anybody reserved them.
        demanded_bytes: reserved when nobody had begun to read them.
        pinned_bytes: held by pins.
    """

    budget_bytes: int
    resident_bytes: int
    reserved_bytes: int
    resident_units: int
    hits: int
    misses: int
    loads: int
    evictions: int
    failures: int
    bytes_read: int
    load_s: float
    prefetch_useful_bytes: int
    prefetch_wasted_bytes: int
    demanded_bytes: int
    pinned_bytes: int

    @property
    def prefetch_precision(self) -> float:
        """Share of the guessed bytes that came true, of those that did or can no more; 0 before the first."""
        settled = self.prefetch_useful_bytes + self.prefetch_wasted_bytes
        return self.prefetch_useful_bytes / settled if settled else 0.0

    @property
    def prefetch_recall(self) -> float:
        """Share of the reserved bytes that had to be read and that a guess had begun to read; 0 before the first."""
        needed = self.prefetch_useful_bytes + self.demanded_bytes
        return self.prefetch_useful_bytes / needed if needed else 0.0
