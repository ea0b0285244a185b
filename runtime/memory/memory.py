"""Expert memory: reads experts and routers from disk when a task is reserved or guessed, under a byte budget.

It knows nothing of prompts or layers' arithmetic; the engine reserves the visible set of a sequence and releases it.
Read first: two sums never exceed the budget: the bytes of what is resident, and the bytes of what is reserved, loaded
or not (with floors: `runtime.memory.accounts`). A load therefore always finds room by evicting what nobody holds, and
it evicts only after the new bytes have been read and checked. A guess reserves nothing: what it names, read for it or
there before, goes last, but it may go before anybody asks for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Container, Mapping
from contextlib import suppress

from runtime.errors import BudgetError, GreenroomError, UnavailableError
from runtime.memory.eviction import EvictionName
from runtime.memory.keys import UnitKey
from runtime.memory.loader import Loader, Priority
from runtime.memory.reservation import Prefetch, Reservation
from runtime.memory.residency import SetResidency, residency_of
from runtime.memory.shelf import Shelf
from runtime.memory.slot import Slot, State
from runtime.memory.statistics import MemoryStatistics
from runtime.memory.tier import HostTier, Tier
from runtime.memory.wanted import Held, VisibleSet, Wanted

_MAX_BACKOFF = 64
_RUN_BYTES = 1 << 20  # read at once, or so many units (two pairs to hash): urgent reads overtake only between runs
_RUN_UNITS = 4


class ExpertMemory:
    """The host tier, and through `tier` the one that kernels read. Safe to share between threads.

    Args:
        budget_bytes: of expert and router tensors in host memory.
        eviction: what goes first, see `runtime.memory.eviction`.
        num_loaders: threads that read.
        retry_s: how long something that failed to load stays quarantined; doubles with every failure in a row.
        floors: tenant -> bytes that the traffic of others leaves in memory.
        tier: what kernels read.
        on_change: called from a loader thread, outside the lock, after each run of loads.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        budget_bytes: int,
        eviction: EvictionName = "lru",
        num_loaders: int = 1,
        retry_s: float = 5.0,
        floors: Mapping[str, int] | None = None,
        tier: Tier | None = None,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget_bytes = budget_bytes
        self._retry_s = retry_s
        self._on_change = on_change
        self._clock = clock
        self._lock = threading.Lock()
        self._tier = tier or HostTier()
        self._shelf = Shelf(budget_bytes, eviction, floors or {}, self._tier)
        self._loader = Loader(self._work, num_threads=num_loaders, name="expert-loader")
        self._closed = False

    def reserve(
        self, visible: VisibleSet, *, priority: Priority = Priority.DEMAND, tenant: str = "", pin: bool = False
    ) -> Reservation | None:
        """Reserve a whole visible set and start reading what is absent; changes nothing unless it succeeds.

        Args:
            visible: what a sequence can touch.
            priority: of the reads; `hurry` raises it later.
            tenant: whose floor it may count for.
            pin: it is held for long; what could never run beside it is refused instead of kept waiting. End it with
                `unpin`.

        Returns:
            the reservation, or None where others' reservations leave too little of the budget now.

        Raises:
            BudgetError: the set exceeds what the budget, the floors of other tenants and pins leave at best.
            RepertoireError: a part of it is quarantined.
            UnavailableError: closed.
        """
        with self._lock:
            if self._closed:
                raise UnavailableError("the expert memory is closed")
            self._check_fits(visible, tenant)
            self._raise_if_quarantined(visible)
            if not self._shelf.accounts.can_reserve(self._shelf.fresh(visible, tenant)):
                return None
            gone: list[UnitKey] = []
            held = self._tier.hold(visible.wanted, gone)
            for slot in (self._shelf.slots[key] for key in gone if key in self._shelf.slots):
                slot.placed = None
            if not held:
                return None
            reservation = Reservation(visible, started=self._clock(), on_release=self._release)
            begin: list[UnitKey] = []
            begun: list[UnitKey] = []
            for wanted in visible.wanted:
                self._reserve_one(reservation, wanted, tenant, begin, begun)
            self._loader.submit(begin, priority=priority)
            self._loader.raise_to(begun, priority)
            if pin:
                self._shelf.pin(reservation.keys, 1)
            reservation.complete_if_ready(self._clock())
            return reservation

    def unpin(self, reservation: Reservation) -> None:
        """Release a reservation that was made with `pin`."""
        with self._lock:
            self._shelf.pin(reservation.keys, -1)
        reservation.release()

    def hurry(self, reservation: Reservation) -> None:
        """A sequence now waits for this reservation: its reads overtake all that nobody waits for."""
        self._loader.raise_to(reservation.keys, Priority.DEMAND)

    def prefetch(self, visible: VisibleSet, *, tenant: str = "", guess: bool = True) -> Prefetch:
        """Start reading what is absent because it may be wanted; reserves nothing and never fails.

        Nothing is read, and nothing more is kept, where the bytes that are reserved, those that open guesses name and
        what floors keep would then exceed the budget: guesses never evict guesses.

        Args:
            visible: what may be wanted.
            tenant: on whose behalf.
            guess: count it, and prefer it to what nobody waits for; else it is as if used now.

        Returns:
            the guess; `cancel` it when it turns out wrong, and what has not been read yet will not be, or when its
            request has reserved what it needs, or ends.
        """
        prefetch = Prefetch(tuple(wanted.key for wanted in visible.wanted), on_cancel=self._withdraw)
        begin: list[UnitKey] = []
        with self._lock:
            more = self._shelf.unforeseen(visible, tenant, guess=guess)
            has_room = not self._closed and self._shelf.accounts.can_guess(more)
            for wanted in visible.wanted:
                slot = self._shelf.slots.get(wanted.key)
                if slot is None and has_room:
                    slot = self._shelf.add(wanted, tenant, guessed=guess)
                    begin.append(wanted.key)
                if guess and slot is not None and (has_room or slot.references or slot.foreseen):
                    self._shelf.foresee(slot, prefetch)
            self._loader.submit(begin, priority=Priority.GUESS)
        return prefetch

    def missing_bytes(self, visible: VisibleSet) -> int:
        """Bytes of these that are neither in memory nor on their way."""
        with self._lock:
            return sum(wanted.num_bytes for wanted in visible.wanted if wanted.key not in self._shelf.slots)

    def evict(self, digests: Container[str]) -> int:
        """Drop what is in memory of these expert sets and nobody holds; returns the bytes that became free."""
        with self._lock:
            return self._shelf.drop_idle(digests)

    def retire_all_but(self, digests: Container[str]) -> None:
        """No generation names other expert sets any more: they go now, or when their last reservation is released."""
        with self._lock:
            self._shelf.retire_all_but(digests)

    def forgive(self) -> None:
        """Something new was published: what is quarantined may be tried again at once."""
        with self._lock:
            for slot in self._shelf.slots.values():
                slot.retry_at = self._clock()

    def state(self, key: UnitKey) -> State:
        """Where one thing stands."""
        with self._lock:
            slot = self._shelf.slots.get(key)
            return slot.state if slot else State.ABSENT

    def residency(self) -> tuple[SetResidency, ...]:
        """What is in memory, on its way or quarantined, per expert set."""
        with self._lock:
            return residency_of(self._shelf.slots.values(), frozenset(+self._shelf.pins))

    def statistics(self) -> MemoryStatistics:
        """A snapshot."""
        with self._lock:
            return self._shelf.counters.snapshot(
                budget_bytes=self.budget_bytes,
                resident_bytes=self._shelf.accounts.resident,
                reserved_bytes=self._shelf.accounts.reserved,
                resident_units=sum(slot.resident for slot in self._shelf.slots.values()),
                pinned_bytes=self._shelf.pinned_bytes(),
            )

    def check_integrity(self) -> None:
        """Assert that the sums equal what the slots say and lie within the budget."""
        with self._lock:
            self._shelf.check_integrity()
            self._tier.check_integrity()

    def close(self) -> None:
        """Finish loads that run, drop the rest; idempotent."""
        with self._lock:
            self._closed = True
        self._loader.close()
        with self._lock:
            for slot in [slot for slot in self._shelf.slots.values() if slot.busy]:
                slot.busy = False  # its job was dropped
                self._shelf.dereference(slot)

    # ---- under the lock

    def _check_fits(self, visible: VisibleSet, tenant: str) -> None:
        needed = sum(wanted.num_bytes for wanted in visible.wanted)
        own = {wanted.key for wanted in visible.wanted}
        kept = self._shelf.accounts.kept_from(tenant) + self._shelf.pinned_bytes(but=own)
        if needed + kept > self.budget_bytes:
            taken = f", of which {kept} are kept for pins and other tenants" if kept else ""
            raise BudgetError(f"experts of {needed} bytes exceed the expert memory of {self.budget_bytes} bytes{taken}")
        self._tier.check_fits(visible.wanted)

    def _raise_if_quarantined(self, visible: VisibleSet) -> None:
        now = self._clock()
        for wanted in visible.wanted:
            slot = self._shelf.slots.get(wanted.key)
            if slot is not None and slot.state is State.FAILED and (slot.references or now < slot.retry_at):
                assert slot.error is not None, "a failed slot knows why"
                raise slot.error

    def _begin_to_place(self, slot: Slot) -> None:
        slot.busy = True
        self._shelf.reference(slot, slot.owner)  # it must not go while it is copied

    def _reserve_one(
        self, reservation: Reservation, wanted: Wanted, tenant: str, begin: list[UnitKey], begun: list[UnitKey]
    ) -> None:
        """Appends what is to be loaded to `begin`, what somebody wanted before and is on its way to `begun`."""
        counters = self._shelf.counters
        slot = self._shelf.slots.get(wanted.key)
        absent = slot is None or slot.state is State.FAILED
        if absent:
            slot = self._shelf.add(wanted, tenant, guessed=False)
            counters.demanded_bytes += wanted.num_bytes
        assert slot is not None, "added"
        was_guessed = self._shelf.reference(slot, tenant)
        counters.prefetch_useful_bytes += slot.num_bytes if was_guessed else 0
        if slot.placed is not None:
            counters.hits += 1
            reservation.add(wanted.key, slot.placed, read=was_guessed)
            return
        counters.misses += 1
        slot.waiting.append(reservation)
        place = slot.resident and not slot.busy
        if place:
            self._begin_to_place(slot)
        (begin if absent or place else begun).append(wanted.key)

    def _release(self, reservation: Reservation) -> None:
        with self._lock:
            for key in reservation.keys:
                self._tier.let_go(key)
                self._shelf.dereference(self._shelf.slots[key])

    def _withdraw(self, guess: Prefetch) -> None:
        with self._lock:
            for key in guess.keys:
                slot = self._shelf.slots.get(key)
                if slot is None or guess not in slot.guesses:
                    continue  # what it named has gone since
                self._shelf.end_guess(slot, guess)
                unwanted = slot.guessed and not slot.guesses and slot.state is State.LOADING
                if unwanted and self._loader.withdraw(key):
                    self._shelf.discard(slot)

    # ---- on a loader thread

    def _work(self, key: UnitKey) -> None:
        """Load a unit, and with it those of its set that would be loaded next anyway: their bytes in one read."""
        slots = self._shelf.slots  # whatever is queued has its slot
        first = slots[key]
        run, fetch, fetch_s = [first], first.wanted.fetch, 0.0
        if fetch is not None and not first.resident:
            limit = max(_RUN_UNITS - 1, _RUN_BYTES // first.num_bytes)
            more = self._loader.take_next(limit, lambda key: slots[key].wanted.fetch == fetch)
            run += [slots[key] for key in more]
            layers = [slot.wanted.key[1] for slot in run if not slot.resident]
            if len(layers) > 1:
                started = time.perf_counter()
                with suppress(GreenroomError, OSError, MemoryError):  # each will say itself what is wrong with it
                    fetch(layers)
                fetch_s = (time.perf_counter() - started) / len(layers)
        started = time.perf_counter()
        read = [(slot, *((slot.value, None) if slot.resident else slot.wanted.attempt())) for slot in run]
        seconds = (time.perf_counter() - started) / len(run) + fetch_s
        with self._lock:
            claimed = {slot for slot, value, _ in read if value is not None and self._tier.claim(slot.wanted)}
        loaded = ((slot, value) for slot, value, _ in read if value is not None and slot in claimed)
        placed = {slot: self._tier.put(slot.wanted.key, value) for slot, value in loaded}
        with self._lock:
            for slot, value, error in read:
                if slot in claimed:
                    self._tier.let_go(slot.wanted.key)
                if not slot.resident:
                    self._settle(slot, value, error, seconds)
                self._hand_out(slot, placed.get(slot))
        self._on_change()

    def _settle(self, slot: Slot, value: Held | None, error: GreenroomError | None, seconds: float) -> None:
        slot.load_s = seconds
        self._shelf.counters.load_s += seconds
        if value is not None:
            self._shelf.admit(slot, value)
            return
        assert error is not None, "nothing read means an error"
        slot.failures += 1
        backoff = min(_MAX_BACKOFF, 2 ** (slot.failures - 1))
        self._shelf.fail(slot, error, retry_at=self._clock() + self._retry_s * backoff)

    def _hand_out(self, slot: Slot, placed: Held | None) -> None:
        """Give those who wait what they wait for, or the reason why they will not get it."""
        slot.placed = placed if slot.resident else None
        was_busy, slot.busy = slot.busy, False
        slot.waiting = [reservation for reservation in slot.waiting if not reservation.released]
        if slot.resident and slot.placed is None and slot.waiting:
            self._begin_to_place(slot)  # it was reserved after this job had looked
            self._loader.submit([slot.wanted.key], priority=Priority.DEMAND)
        else:
            waiting, slot.waiting = slot.waiting, []
            for reservation in waiting:
                if slot.placed is None:
                    reservation.fail(slot.error)
                else:
                    reservation.add(slot.wanted.key, slot.placed, read=True)
                    reservation.complete_if_ready(self._clock())
        if was_busy:
            self._shelf.dereference(slot)
