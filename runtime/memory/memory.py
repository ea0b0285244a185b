"""Expert memory: reads experts from disk when a mixture is reserved or guessed, and keeps them under a byte budget.

It knows nothing of prompts or layers' arithmetic; the engine reserves the visible set of a sequence and releases it.
Read first: two sums never exceed the budget: the bytes of resident units, and the bytes of reserved units, loaded or
not. A load therefore always finds room by evicting units that nobody reserves, and it evicts only after the new bytes
have been read and checked. A guess reserves nothing: what it reads may be evicted before anybody asks for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum, auto

from runtime.errors import BudgetError, GreenroomError, RepertoireError, UnavailableError
from runtime.memory.eviction import EvictionName, make_eviction
from runtime.memory.loader import Loader, Priority
from runtime.memory.reservation import Prefetch, Reservation, UnitKey
from runtime.memory.statistics import Counters, MemoryStatistics
from runtime.model.expert import Expert
from runtime.model.manifest import ExpertSet, Unit

ReadUnit = Callable[[ExpertSet, Unit], Expert]
Units = Sequence[tuple[ExpertSet, Unit]]


class _State(Enum):
    LOADING = auto()
    READY = auto()
    FAILED = auto()


class _Slot:
    """One (layer, expert) that is resident, on its way, or quarantined."""

    def __init__(self, entry: ExpertSet, unit: Unit, *, guessed: bool) -> None:
        self.entry = entry
        self.unit = unit
        self.state = _State.LOADING
        self.references = 0
        self.guesses = 0
        self.guessed = guessed  # read because of a guess, and nobody has asked for it yet
        self.expert: Expert | None = None
        self.error: GreenroomError | None = None
        self.retry_at = 0.0
        self.load_s = 0.0
        self.waiting: list[Reservation] = []


class ExpertMemory:
    """The host tier.

    Args:
        read_unit: reads, checks and parses one unit; called on a loader thread.
        budget_bytes: of expert tensors in host memory.
        eviction: which units go first, see `runtime.memory.eviction`.
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
        eviction: EvictionName = "lru",
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
        self._slots: dict[UnitKey, _Slot] = {}
        self._eviction = make_eviction(eviction)
        self._loader = Loader(num_loaders, name="expert-loader")
        self._closed = False
        self._resident_bytes = self._reserved_bytes = self._guessed_bytes = 0
        self._counters = Counters()

    def reserve(self, units: Units, *, priority: Priority = Priority.DEMAND) -> Reservation | None:
        """Reserve a whole visible set and start reading what is absent; changes nothing unless it succeeds.

        Args:
            units: every (layer, expert) that a sequence can touch, in the order in which they should be read.
            priority: of the reads; `hurry` raises it later.

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
                self._reserve_unit(reservation, entry, unit, priority)
            reservation.complete_if_ready(self._clock())
            return reservation

    def hurry(self, reservation: Reservation) -> None:
        """A sequence now waits for this reservation: its reads overtake all that nobody waits for."""
        for key in reservation.keys:
            self._loader.raise_to(key, Priority.DEMAND)

    def prefetch(self, units: Units) -> Prefetch:
        """Start reading what is absent because it may be wanted; reserves nothing and never fails.

        Nothing is read where reserved bytes and open guesses would then exceed the budget: guesses never evict guesses.

        Returns:
            the guess; `cancel` it when it turns out wrong, and what has not been read yet will not be.
        """
        keys = []
        with self._lock:
            absent = sum(unit.bytes for entry, unit in units if (entry.digest, unit.layer) not in self._slots)
            if not self._closed and self._reserved_bytes + self._guessed_bytes + absent <= self.budget_bytes:
                for entry, unit in units:
                    key = (entry.digest, unit.layer)
                    slot = self._slots.get(key) or self._start(key, entry, unit, Priority.GUESS, guessed=True)
                    if slot.state is _State.LOADING:
                        slot.guesses += 1
                        keys.append(key)
        return Prefetch(tuple(keys), on_cancel=self._withdraw)

    def missing_bytes(self, units: Units) -> int:
        """Bytes of these units that are neither in memory nor on their way."""
        with self._lock:
            return sum(unit.bytes for entry, unit in units if (entry.digest, unit.layer) not in self._slots)

    def statistics(self) -> MemoryStatistics:
        """A snapshot."""
        with self._lock:
            return self._counters.snapshot(
                budget_bytes=self.budget_bytes,
                resident_bytes=self._resident_bytes,
                reserved_bytes=self._reserved_bytes,
                resident_units=sum(slot.state is _State.READY for slot in self._slots.values()),
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
            guessed = [slot for slot in self._slots.values() if slot.guessed]
            assert self._guessed_bytes == sum(slot.unit.bytes for slot in guessed), "guessed bytes drifted"
            for key, slot in self._slots.items():
                assert slot.references >= 0, f"{key}: negative references"
                assert slot.guesses >= 0, f"{key}: negative guesses"
                assert (slot.expert is not None) == (slot.state is _State.READY), f"{key}: {slot.state} and its expert"

    def close(self) -> None:
        """Finish loads that run, drop the rest; idempotent."""
        with self._lock:
            self._closed = True
        self._loader.close()

    # ---- under the lock

    def _references(self, key: UnitKey) -> int:
        slot = self._slots.get(key)
        return slot.references if slot else 0

    def _raise_if_quarantined(self, units: Units) -> None:
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

    def _start(self, key: UnitKey, entry: ExpertSet, unit: Unit, priority: Priority, *, guessed: bool) -> _Slot:
        slot = self._slots[key] = _Slot(entry, unit, guessed=guessed)
        self._guessed_bytes += unit.bytes if guessed else 0
        self._loader.submit(key, lambda: self._load(key, slot), priority=priority, order=unit.layer)
        return slot

    def _reserve_unit(self, reservation: Reservation, entry: ExpertSet, unit: Unit, priority: Priority) -> None:
        key = (entry.digest, unit.layer)
        slot = self._slots.get(key) or self._start(key, entry, unit, priority, guessed=False)
        if not slot.references:
            self._reserved_bytes += unit.bytes
        slot.references += 1
        was_guessed = self._settle_guess(slot)
        self._counters.prefetch_useful_bytes += unit.bytes if was_guessed else 0
        if slot.state is _State.READY:
            self._counters.hits += 1
            self._eviction.used(key, num_bytes=unit.bytes, load_s=slot.load_s)
            assert slot.expert is not None, "a ready slot holds its expert"
            reservation.add(key, slot.expert, read=was_guessed)
        else:
            self._counters.misses += 1
            self._loader.raise_to(key, priority)
            slot.waiting.append(reservation)

    def _release(self, reservation: Reservation) -> None:
        with self._lock:
            for key in reservation.keys:
                slot = self._slots[key]
                slot.references -= 1
                if not slot.references and slot.state is not _State.FAILED:
                    self._reserved_bytes -= slot.unit.bytes

    def _withdraw(self, guess: Prefetch) -> None:
        with self._lock:
            for key in guess.keys:
                slot = self._slots.get(key)
                if slot is None or not slot.guesses:
                    continue
                slot.guesses -= 1
                unwanted = slot.guessed and not slot.guesses and slot.state is _State.LOADING
                if unwanted and self._loader.withdraw(key):
                    self._settle_guess(slot)
                    del self._slots[key]

    def _settle_guess(self, slot: _Slot) -> bool:
        """The slot is no open guess any more; True if it was one."""
        was_guessed, slot.guessed = slot.guessed, False
        self._guessed_bytes -= slot.unit.bytes if was_guessed else 0
        return was_guessed

    def _make_room(self, num_bytes: int) -> bool:
        idle = [key for key, slot in self._slots.items() if slot.state is _State.READY and not slot.references]
        order = self._eviction.order(idle)
        order.sort(key=lambda key: self._slots[key].guessed)  # type: ignore[index]  # open guesses go last
        for key in order:
            if self._resident_bytes + num_bytes <= self.budget_bytes:
                break
            slot = self._slots.pop(key)  # type: ignore[call-overload]
            self._resident_bytes -= slot.unit.bytes
            self._eviction.gone(key, evicted=True)
            self._counters.evictions += 1
            self._counters.prefetch_wasted_bytes += slot.unit.bytes if self._settle_guess(slot) else 0
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
            slot.load_s = time.perf_counter() - started
            self._counters.load_s += slot.load_s
            waiting, slot.waiting = slot.waiting, []
            now = self._clock()
            if expert is not None:
                self._admit(key, slot, expert)
            else:
                assert error is not None, "no expert means an error"
                slot.state, slot.error, slot.retry_at = _State.FAILED, error, now + self._retry_s
                self._counters.failures += 1
                self._settle_guess(slot)
                self._reserved_bytes -= slot.unit.bytes if slot.references else 0
            for reservation in waiting:
                if expert is None:
                    reservation.fail(error)
                else:
                    reservation.add(key, expert, read=True)
                    reservation.complete_if_ready(now)
        self._on_change()

    def _admit(self, key: UnitKey, slot: _Slot, expert: Expert) -> None:
        self._counters.loads += 1
        self._counters.bytes_read += slot.unit.bytes
        if self._make_room(slot.unit.bytes):
            slot.state, slot.expert = _State.READY, expert
            self._resident_bytes += slot.unit.bytes
            self._eviction.used(key, num_bytes=slot.unit.bytes, load_s=slot.load_s)
        else:
            assert not slot.references, "reserved units always find room"
            del self._slots[key]
            self._counters.prefetch_wasted_bytes += slot.unit.bytes if self._settle_guess(slot) else 0
