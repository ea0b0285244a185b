"""The shelf: all slots and their sums, and what goes when room is needed; plain state without threads or disks.

It knows nothing of reads or reservations; `runtime.memory.memory` changes it under its lock.
Read first: a slot's bytes count as resident while it has a value, as reserved while somebody references it (and it has
not failed), as guessed while an open guess names it and nobody references it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping

from runtime.errors import GreenroomError
from runtime.memory.accounts import Accounts
from runtime.memory.eviction import EvictionName, make_eviction
from runtime.memory.keys import UnitKey
from runtime.memory.reservation import Prefetch
from runtime.memory.slot import Slot, State
from runtime.memory.statistics import Counters
from runtime.memory.tier import Tier
from runtime.memory.wanted import Held, VisibleSet, Wanted


class Shelf:
    """Slots by key.

    Args:
        budget_bytes: of what is resident, and of what is reserved.
        eviction: what goes first.
        floors: tenant -> bytes that the traffic of others leaves alone.
        tier: told what is forgotten.

    `slots`, `accounts` and `counters` are there to be read.
    """

    def __init__(self, budget_bytes: int, eviction: EvictionName, floors: Mapping[str, int], tier: Tier) -> None:
        self.slots: dict[UnitKey, Slot] = {}
        self.accounts = Accounts(budget_bytes, floors)
        self.counters = Counters()
        self.pins: Counter[UnitKey] = Counter()
        self._tier = tier
        self._eviction = make_eviction(eviction)

    def add(self, wanted: Wanted, tenant: str, *, guessed: bool) -> Slot:
        """Make a slot for what is absent or has failed; it begins as LOADING."""
        before = self.slots.get(wanted.key)
        failures, owner = (before.failures, before.owner) if before else (0, tenant)
        slot = self.slots[wanted.key] = Slot(wanted, guessed=guessed, owner=owner, failures=failures)
        return slot

    def fresh(self, visible: VisibleSet, tenant: str) -> Counter[str]:
        """Bytes of a set that nobody has reserved, by whose they would be."""
        fresh: Counter[str] = Counter()
        for wanted in visible.wanted:
            slot = self.slots.get(wanted.key)
            if slot is None or not slot.references:
                fresh[self.accounts.owner(slot.owner if slot else tenant, tenant)] += wanted.num_bytes
        return fresh

    def unforeseen(self, visible: VisibleSet, tenant: str, *, guess: bool) -> Counter[str]:
        """Bytes by owner: what is absent of a set, and for a guess also what nobody holds and no other guess names."""
        found: Counter[str] = Counter()
        for wanted in visible.wanted:
            slot = self.slots.get(wanted.key)
            if slot is None:
                found[tenant] += wanted.num_bytes
            elif guess and not (slot.references or slot.foreseen or slot.state is State.FAILED):
                found[slot.owner] += wanted.num_bytes
        return found

    def reference(self, slot: Slot, tenant: str) -> bool:
        """Hold a slot once more; True if it was read for a guess and nobody has held it before."""
        owner = self.accounts.owner(slot.owner, tenant)
        if owner != slot.owner:
            self._move(slot, owner)
        if not slot.references:
            self.accounts.add_reserved(slot.owner, slot.num_bytes)
        slot.references += 1
        self._weigh(slot)
        if slot.resident:
            self._eviction.used(slot.wanted.key, num_bytes=slot.num_bytes, load_s=slot.load_s)
        was_guessed, slot.guessed = slot.guessed, False
        return was_guessed

    def dereference(self, slot: Slot) -> None:
        """End one hold of a slot."""
        slot.references -= 1
        if not slot.references and slot.state is not State.FAILED:
            self.accounts.add_reserved(slot.owner, -slot.num_bytes)
            self._weigh(slot)
            if slot.state is State.RETIRED:
                self.drop(slot.wanted.key)

    def foresee(self, slot: Slot, guess: Prefetch) -> None:
        """An open guess names a slot: while nobody holds it, it goes last."""
        slot.guesses.add(guess)
        self._weigh(slot)

    def end_guess(self, slot: Slot, guess: Prefetch) -> None:
        """A guess names a slot no more."""
        slot.guesses.remove(guess)
        self._weigh(slot)

    def admit(self, slot: Slot, value: Held) -> bool:
        """What was read comes in; False, and the slot is gone, where there is no room for what nobody holds."""
        self.counters.loads += 1
        self.counters.bytes_read += slot.num_bytes
        if not self._make_room(slot):
            assert not slot.references, "what is reserved always finds room"
            self.drop(slot.wanted.key)
            return False
        slot.state, slot.value, slot.failures = State.READY, value, 0
        self.accounts.add_resident(slot.owner, slot.num_bytes)
        self._eviction.used(slot.wanted.key, num_bytes=slot.num_bytes, load_s=slot.load_s)
        return True

    def fail(self, slot: Slot, error: GreenroomError, *, retry_at: float) -> None:
        """It could not be read; it stays quarantined until `retry_at`."""
        slot.state, slot.error, slot.retry_at = State.FAILED, error, retry_at
        self.counters.failures += 1
        slot.guessed = False
        self._weigh(slot)
        if slot.references:
            self.accounts.add_reserved(slot.owner, -slot.num_bytes)

    def discard(self, slot: Slot) -> None:
        """Forget a slot that nobody holds, and the guesses that name it."""
        slot.guesses.clear()
        self._weigh(slot)
        del self.slots[slot.wanted.key]

    def drop(self, key: UnitKey) -> int:
        """Forget a slot that nobody holds; returns the bytes that it had in memory."""
        slot = self.slots[key]
        self.counters.prefetch_wasted_bytes += slot.num_bytes if slot.guessed else 0
        self.discard(slot)
        self._tier.forget(key)
        if not slot.resident:
            return 0
        self.accounts.add_resident(slot.owner, -slot.num_bytes)
        self._eviction.gone(key, evicted=True)
        self.counters.evictions += 1
        return slot.num_bytes

    def drop_idle(self, digests: Container[str]) -> int:
        """Drop what nobody holds of these expert sets; returns the bytes."""
        return sum(self.drop(key) for key in [k for k, s in self.slots.items() if k[0] in digests and s.idle])

    def retire_all_but(self, digests: Container[str]) -> None:
        """Other expert sets go now, or when their last hold ends."""
        for key, slot in list(self.slots.items()):
            if key[0] in digests:
                slot.state = State.READY if slot.state is State.RETIRED else slot.state
            elif slot.idle or (slot.state is State.FAILED and not slot.references):
                self.drop(key)
            elif slot.state is State.READY:
                slot.state = State.RETIRED

    def pinned_bytes(self, but: Container[UnitKey] = ()) -> int:
        """Bytes that pins hold, except those of these keys."""
        return sum(self.slots[key].num_bytes for key in +self.pins if key not in but)

    def pin(self, keys: Iterable[UnitKey], sign: int) -> None:
        """Count a pin of these keys, or with -1 its end."""
        for key in keys:
            self.pins[key] += sign

    def check_integrity(self) -> None:
        """Assert that the sums equal what the slots say and lie within the budget."""
        accounts, slots = self.accounts, self.slots.values()
        accounts.check()
        assert accounts.resident == sum(slot.num_bytes for slot in slots if slot.resident), "resident bytes drifted"
        held = [slot for slot in slots if slot.references and slot.state is not State.FAILED]
        assert accounts.reserved == sum(slot.num_bytes for slot in held), "reserved bytes drifted"
        guessed: Counter[str] = Counter()
        for slot in slots:
            guessed[slot.owner] += slot.num_bytes if slot.foreseen else 0
        assert +accounts.guessed_of == +guessed, "guessed bytes drifted"
        assert all(self.slots[key].references for key in +self.pins), "something pinned is not held"
        for key, slot in self.slots.items():
            assert slot.references >= 0, f"{key}: negative references"
            assert slot.foreseen is _is_foreseen(slot), f"{key}: foreseen, and its guesses"
            in_memory = slot.state in {State.READY, State.RETIRED}
            assert slot.resident == in_memory, f"{key}: {slot.state} and its value"
            assert slot.placed is None or slot.resident, f"{key}: placed, but not in host memory"

    def _weigh(self, slot: Slot) -> None:
        """Whether it is foreseen may have changed."""
        foreseen = _is_foreseen(slot)
        if foreseen is not slot.foreseen:
            slot.foreseen = foreseen
            self.accounts.add_guessed(slot.owner, slot.num_bytes if foreseen else -slot.num_bytes)

    def _move(self, slot: Slot, owner: str) -> None:
        for sign, name in ((-1, slot.owner), (1, owner)):
            if slot.resident:
                self.accounts.add_resident(name, sign * slot.num_bytes)
            if slot.references and slot.state is not State.FAILED:
                self.accounts.add_reserved(name, sign * slot.num_bytes)
            if slot.foreseen:
                self.accounts.add_guessed(name, sign * slot.num_bytes)
        slot.owner = owner

    def _make_room(self, new: Slot) -> bool:
        """Drop what is idle until a slot's bytes are free; drops nothing where that would not do.

        What is foreseen goes last, and only for what somebody holds.
        """
        missing = self.accounts.resident + new.num_bytes - self.accounts.budget
        going: dict[UnitKey, int] = {}
        of_owner: Counter[str] = Counter()
        for foreseen in (False, True) if new.references else (False,):
            order = self._eviction.order()
            while missing > 0 and (key := next(order, None)) is not None:
                slot = self.slots[key]
                protected = self.accounts.protects(slot.owner, new.owner, but=of_owner[slot.owner])
                if slot.idle and slot.foreseen is foreseen and not protected:
                    missing -= slot.num_bytes
                    of_owner[slot.owner] += slot.num_bytes
                    going[key] = slot.num_bytes
            del order
        if missing > 0:
            return False
        for key in going:
            self.drop(key)
        return True


def _is_foreseen(slot: Slot) -> bool:
    return bool(slot.guesses) and not slot.references and slot.state is not State.FAILED
