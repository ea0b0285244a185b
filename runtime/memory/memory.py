"""Expert memory: reads experts from disk when a mixture is reserved, and keeps them in host memory under a byte budget.

It knows nothing of prompts or layers' arithmetic; the engine reserves the visible set of a sequence and releases it.
Read first: two sums never exceed the budget: the bytes of resident units, and the bytes of reserved units, loaded or
not. A load therefore always finds room by evicting units that nobody reserves, and it evicts only after the new bytes
have been read and checked.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, auto

from runtime.errors import BudgetError, GreenroomError, RepertoireError, UnavailableError
from runtime.memory.reservation import Reservation, UnitKey
from runtime.model.expert import Expert
from runtime.model.manifest import ExpertSet, Unit

ReadUnit = Callable[[ExpertSet, Unit], Expert]


@dataclass(frozen=True, kw_only=True)
class MemoryStatistics:
    """Counters since the start, and what is resident now; bytes and seconds."""

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


class _State(Enum):
    LOADING = auto()
    READY = auto()
    FAILED = auto()


class _Slot:
    """One (layer, expert) that is resident, on its way, or quarantined."""

    def __init__(self, entry: ExpertSet, unit: Unit) -> None:
        self.entry = entry
        self.unit = unit
        self.state = _State.LOADING
        self.references = 0
        self.expert: Expert | None = None
        self.error: GreenroomError | None = None
        self.retry_at = 0.0
        self.waiting: list[Reservation] = []


class ExpertMemory:
    """The host tier.

    Args:
        read_unit: reads, checks and parses one unit; called on a loader thread.
        budget_bytes: of expert tensors in host memory.
        num_loaders: threads that read.
        retry_s: how long a unit that failed to load stays quarantined before the disk is asked again.
        on_change: called from a loader thread after a load ended, outside the lock.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        read_unit: ReadUnit,
        *,
        budget_bytes: int,
        num_loaders: int = 1,
        retry_s: float = 5.0,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget_bytes = budget_bytes
        self._read_unit = read_unit
        self._retry_s = retry_s
        self._on_change = on_change
        self._clock = clock
        self._lock = threading.Lock()
        self._slots: OrderedDict[UnitKey, _Slot] = OrderedDict()  # least recently reserved first
        self._loaders = ThreadPoolExecutor(num_loaders, thread_name_prefix="expert-loader")
        self._closed = False
        self._resident_bytes = self._reserved_bytes = 0
        self._hits = self._misses = self._loads = self._evictions = self._failures = self._bytes_read = 0
        self._load_s = 0.0

    def reserve(self, units: Sequence[tuple[ExpertSet, Unit]]) -> Reservation | None:
        """Reserve a whole visible set and start reading what is absent; changes nothing unless it succeeds.

        Args:
            units: every (layer, expert) that a sequence can touch, in the order in which they should be read.

        Returns:
            the reservation, or None where others' reservations leave too little of the budget now.

        Raises:
            BudgetError: the set exceeds the whole budget.
            RepertoireError: a unit is quarantined.
            UnavailableError: closed.
        """
        needed = sum(unit.bytes for _, unit in units)
        if needed > self.budget_bytes:
            raise BudgetError(f"experts of {needed} bytes exceed the expert memory of {self.budget_bytes} bytes")
        with self._lock:
            if self._closed:
                raise UnavailableError("the expert memory is closed")
            self._raise_if_quarantined(units)
            fresh = sum(unit.bytes for entry, unit in units if not self._references((entry.digest, unit.layer)))
            if self._reserved_bytes + fresh > self.budget_bytes:
                return None
            reservation = Reservation(units, started=self._clock(), on_release=self._release)
            for entry, unit in units:
                self._reserve_unit(reservation, entry, unit)
            reservation.complete_if_ready(self._clock())
            return reservation

    def statistics(self) -> MemoryStatistics:
        """A snapshot."""
        with self._lock:
            return MemoryStatistics(
                budget_bytes=self.budget_bytes,
                resident_bytes=self._resident_bytes,
                reserved_bytes=self._reserved_bytes,
                resident_units=sum(slot.state is _State.READY for slot in self._slots.values()),
                hits=self._hits,
                misses=self._misses,
                loads=self._loads,
                evictions=self._evictions,
                failures=self._failures,
                bytes_read=self._bytes_read,
                load_s=self._load_s,
            )

    def check_integrity(self) -> None:
        """Assert that the sums equal what the slots say and lie within the budget."""
        with self._lock:
            ready = [slot for slot in self._slots.values() if slot.state is _State.READY]
            reserved = [slot for slot in self._slots.values() if slot.references and slot.state is not _State.FAILED]
            assert self._resident_bytes == sum(slot.unit.bytes for slot in ready), "resident bytes drifted"
            assert self._reserved_bytes == sum(slot.unit.bytes for slot in reserved), "reserved bytes drifted"
            assert self._resident_bytes <= self.budget_bytes, "resident bytes exceed the budget"
            assert self._reserved_bytes <= self.budget_bytes, "reserved bytes exceed the budget"
            for key, slot in self._slots.items():
                assert slot.references >= 0, f"{key}: negative references"
                assert (slot.expert is not None) == (slot.state is _State.READY), f"{key}: {slot.state} and its expert"

    def close(self) -> None:
        """Finish loads that run, drop the rest; idempotent."""
        with self._lock:
            self._closed = True
        self._loaders.shutdown(wait=True, cancel_futures=True)

    # ---- under the lock

    def _references(self, key: UnitKey) -> int:
        slot = self._slots.get(key)
        return slot.references if slot else 0

    def _raise_if_quarantined(self, units: Sequence[tuple[ExpertSet, Unit]]) -> None:
        now = self._clock()
        for entry, unit in units:
            key = (entry.digest, unit.layer)
            slot = self._slots.get(key)
            if slot is None or slot.state is not _State.FAILED:
                continue
            if slot.references or now < slot.retry_at:
                assert slot.error is not None, "a failed slot knows why"
                raise slot.error
            del self._slots[key]

    def _reserve_unit(self, reservation: Reservation, entry: ExpertSet, unit: Unit) -> None:
        key = (entry.digest, unit.layer)
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = _Slot(entry, unit)
            self._loaders.submit(self._load, key, slot)
        self._slots.move_to_end(key)
        if not slot.references:
            self._reserved_bytes += unit.bytes
        slot.references += 1
        if slot.state is _State.READY:
            self._hits += 1
            assert slot.expert is not None, "a ready slot holds its expert"
            reservation.add(key, slot.expert, read=False)
        else:
            self._misses += 1
            slot.waiting.append(reservation)

    def _release(self, reservation: Reservation) -> None:
        with self._lock:
            for key in reservation.keys:
                slot = self._slots[key]
                slot.references -= 1
                if not slot.references and slot.state is not _State.FAILED:
                    self._reserved_bytes -= slot.unit.bytes

    def _make_room(self, num_bytes: int) -> bool:
        for key in [k for k, slot in self._slots.items() if slot.state is _State.READY and not slot.references]:
            if self._resident_bytes + num_bytes <= self.budget_bytes:
                break
            self._resident_bytes -= self._slots.pop(key).unit.bytes
            self._evictions += 1
        return self._resident_bytes + num_bytes <= self.budget_bytes

    # ---- on a loader thread

    def _load(self, key: UnitKey, slot: _Slot) -> None:
        started = time.perf_counter()
        expert: Expert | None = None
        error: GreenroomError | None = None
        try:
            expert = self._read_unit(slot.entry, slot.unit)
        except GreenroomError as caught:
            error = caught
        except (OSError, MemoryError) as caught:
            error = RepertoireError(f"expert set {slot.entry.digest}: layer {slot.unit.layer} cannot be read: {caught}")
        with self._lock:
            self._load_s += time.perf_counter() - started
            waiting, slot.waiting = slot.waiting, []
            now = self._clock()
            if expert is not None:
                self._admit(key, slot, expert)
            else:
                assert error is not None, "no expert means an error"
                slot.state, slot.error, slot.retry_at = _State.FAILED, error, now + self._retry_s
                self._failures += 1
                self._reserved_bytes -= slot.unit.bytes if slot.references else 0
            for reservation in waiting:
                if expert is None:
                    reservation.fail(error)
                else:
                    reservation.add(key, expert, read=True)
                    reservation.complete_if_ready(now)
        self._on_change()

    def _admit(self, key: UnitKey, slot: _Slot, expert: Expert) -> None:
        self._loads += 1
        self._bytes_read += slot.unit.bytes
        if self._make_room(slot.unit.bytes):
            slot.state, slot.expert = _State.READY, expert
            self._resident_bytes += slot.unit.bytes
        else:
            assert not slot.references, "reserved units always find room"
            del self._slots[key]
