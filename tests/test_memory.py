"""Expert memory: budgets, eviction, sharing, failures; checked with a reader that the test controls."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from runtime.errors import BudgetError, DigestMismatchError, UnavailableError
from runtime.memory.eviction import EvictionName
from runtime.memory.loader import Priority
from runtime.memory.memory import ExpertMemory
from runtime.memory.reservation import Prefetch, Reservation
from runtime.model.expert import Expert, LowRank
from runtime.model.manifest import ExpertSet, Unit

UNIT_BYTES = 100


def make_set(name: str, num_layers: int = 2) -> list[tuple[ExpertSet, Unit]]:
    digest = name[0] * 64
    units = tuple(
        Unit(layer=layer, ranks={"gate": 1}, offset=layer * UNIT_BYTES, bytes=UNIT_BYTES, sha256="0" * 64)
        for layer in range(num_layers)
    )
    entry = ExpertSet(digest=digest, task=name, bytes=num_layers * UNIT_BYTES, dtype="float32", scale=1.0, units=units)
    return [(entry, unit) for unit in units]


class Disk:
    """A reader whose reads wait until they are allowed, and fail where told."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.reading = threading.Event()
        self.reads: list[tuple[str, int]] = []
        self.bad: set[str] = set()

    def read(self, entry: ExpertSet, unit: Unit) -> Expert:
        self.reading.set()
        assert self.gate.wait(10)
        self.reads.append((entry.task, unit.layer))
        if entry.task in self.bad:
            raise DigestMismatchError(f"{entry.task} is bad")
        return Expert(unit.layer, 1.0, {"gate": LowRank(torch.zeros(1, 1), torch.zeros(1, 1))})


class Signal:
    """Counts finished loads and lets the test wait for them."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._count = 0

    def __call__(self) -> None:
        with self._condition:
            self._count += 1
            self._condition.notify_all()

    def wait_for(self, count: int) -> None:
        with self._condition:
            assert self._condition.wait_for(lambda: self._count >= count, timeout=10)


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def loaded() -> Signal:
    return Signal()


def make_memory(disk: Disk, loaded: Signal, *, units: int, clock: object = None) -> ExpertMemory:
    extra = {} if clock is None else {"clock": clock}
    return ExpertMemory(disk.read, budget_bytes=units * UNIT_BYTES, on_change=loaded, **extra)  # type: ignore[arg-type]


def test_a_reservation_reads_its_units_once_and_a_second_one_shares_them(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(disk, loaded, units=4)
    first = memory.reserve(make_set("a"))
    assert first is not None
    loaded.wait_for(2)
    second = memory.reserve(make_set("a"))
    assert second is not None
    assert first.ready
    assert second.ready
    assert disk.reads == [("a", 0), ("a", 1)]
    assert first.bytes_read("a" * 64) == 200
    assert second.bytes_read("a" * 64) == 0
    assert memory.statistics().hits == 2
    memory.check_integrity()
    memory.close()


def test_the_least_recently_reserved_set_is_evicted_and_reserved_ones_never_are(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(disk, loaded, units=4)
    held = memory.reserve(make_set("a"))
    old = memory.reserve(make_set("b"))
    assert held is not None
    assert old is not None
    loaded.wait_for(4)
    old.release()
    new = memory.reserve(make_set("c"))
    assert new is not None
    loaded.wait_for(6)
    assert memory.statistics().evictions == 2
    assert held.ready
    assert memory.reserve(make_set("b")) is None, "a and c hold the whole budget"
    memory.check_integrity()
    new.release()
    assert memory.reserve(make_set("b")) is not None
    memory.close()


def test_nothing_is_evicted_for_a_set_that_turns_out_bad(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(disk, loaded, units=2)
    good = memory.reserve(make_set("a"))
    assert good is not None
    loaded.wait_for(2)
    good.release()
    disk.bad.add("b")
    bad = memory.reserve(make_set("b"))
    assert bad is not None
    loaded.wait_for(4)
    assert isinstance(bad.error, DigestMismatchError)
    assert not bad.ready
    bad.release()
    assert memory.statistics().evictions == 0
    again = memory.reserve(make_set("a"))
    assert again is not None
    assert again.ready
    memory.check_integrity()
    memory.close()


def test_a_bad_set_stays_quarantined_until_its_time_has_passed(disk: Disk, loaded: Signal) -> None:
    now = [0.0]
    memory = make_memory(disk, loaded, units=4, clock=lambda: now[0])
    disk.bad.add("a")
    bad = memory.reserve(make_set("a", 1))
    assert bad is not None
    loaded.wait_for(1)
    bad.release()
    with pytest.raises(DigestMismatchError, match="a is bad"):
        memory.reserve(make_set("a", 1))
    assert len(disk.reads) == 1, "the quarantine answers without the disk"
    disk.bad.clear()
    now[0] = 6.0
    cured = memory.reserve(make_set("a", 1))
    assert cured is not None
    loaded.wait_for(2)
    assert cured.ready
    memory.check_integrity()
    memory.close()


def test_a_set_larger_than_the_budget_is_refused_for_good(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(disk, loaded, units=1)
    with pytest.raises(BudgetError, match="200 bytes exceed the expert memory of 100 bytes"):
        memory.reserve(make_set("a"))
    memory.close()
    with pytest.raises(UnavailableError):
        memory.reserve(make_set("a", 1))


def test_releasing_during_a_load_gives_the_bytes_back(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(disk, loaded, units=2)
    disk.gate.clear()
    early = memory.reserve(make_set("a"))
    assert early is not None
    early.release()
    early.release()
    assert memory.statistics().reserved_bytes == 0
    other = memory.reserve(make_set("b"))
    assert other is not None
    disk.gate.set()
    loaded.wait_for(4)
    assert other.ready
    memory.check_integrity()
    memory.close()


def test_a_right_guess_is_read_before_it_is_asked_for_and_counted_as_useful(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(disk, loaded, units=4)
    memory.prefetch(make_set("a"))
    loaded.wait_for(2)
    assert memory.statistics().reserved_bytes == 0
    reservation = memory.reserve(make_set("a"))
    assert reservation is not None
    assert reservation.ready
    statistics = memory.statistics()
    assert (statistics.prefetch_useful_bytes, statistics.prefetch_wasted_bytes) == (200, 0)
    memory.check_integrity()
    memory.close()


def test_a_wrong_guess_is_withdrawn_unless_it_was_read_and_then_it_goes_first_and_counts_as_wasted(
    disk: Disk, loaded: Signal
) -> None:
    memory = make_memory(disk, loaded, units=2)
    disk.gate.clear()
    guess = memory.prefetch(make_set("a"))
    assert disk.reading.wait(10)
    guess.cancel()
    guess.cancel()
    right = memory.reserve(make_set("b"))
    assert right is not None
    disk.gate.set()
    loaded.wait_for(3)
    assert right.ready
    assert disk.reads == [("a", 0), ("b", 0), ("b", 1)], "the first read had begun; the second was withdrawn"
    assert memory.statistics().prefetch_wasted_bytes == 100
    memory.check_integrity()
    memory.close()


def test_a_demand_overtakes_guesses_and_a_guess_that_comes_true_is_not_read_twice(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(disk, loaded, units=8)
    disk.gate.clear()
    guess = memory.prefetch(make_set("a", 3))
    assert disk.reading.wait(10)
    memory.prefetch(make_set("b", 1))
    wanted = memory.reserve(make_set("b", 1))
    assert wanted is not None
    confirmed = memory.reserve(make_set("a", 3), priority=Priority.CONFIRMED)
    assert confirmed is not None
    guess.cancel()
    disk.gate.set()
    loaded.wait_for(4)
    assert disk.reads == [("a", 0), ("b", 0), ("a", 1), ("a", 2)]
    assert confirmed.ready
    assert memory.statistics().prefetch_useful_bytes == 400
    memory.check_integrity()
    memory.close()


def test_a_guess_never_takes_the_room_of_what_is_reserved(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(disk, loaded, units=2)
    held = memory.reserve(make_set("a"))
    assert held is not None
    loaded.wait_for(2)
    memory.prefetch(make_set("b"))
    memory.prefetch(make_set("c", 3))
    held.release()
    memory.prefetch(make_set("b"))
    loaded.wait_for(4)
    memory.prefetch(make_set("d"))
    assert disk.reads == [("a", 0), ("a", 1), ("b", 0), ("b", 1)], "guesses wait for room, and never evict guesses"
    memory.check_integrity()
    memory.close()


def test_what_nobody_waits_for_goes_before_an_open_guess(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(disk, loaded, units=4)
    memory.prefetch(make_set("a"))
    loaded.wait_for(2)
    idle = memory.reserve(make_set("b"))
    assert idle is not None
    loaded.wait_for(4)
    idle.release()
    memory.prefetch(make_set("c"))
    loaded.wait_for(6)
    guessed = memory.reserve(make_set("a"))
    assert guessed is not None
    assert guessed.ready, "b was used later, but a is still a guess that may come true"
    assert memory.statistics().prefetch_wasted_bytes == 0
    memory.check_integrity()
    memory.close()


def test_a_reservation_says_from_which_layer_on_something_is_missing(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(disk, loaded, units=4)
    disk.gate.clear()
    reservation = memory.reserve(make_set("a"))
    assert reservation is not None
    assert reservation.next_missing_layer() == 0
    disk.gate.set()
    loaded.wait_for(2)
    assert reservation.next_missing_layer() is None
    memory.close()


@pytest.mark.parametrize("eviction", ["lru", "gdsf"])
@pytest.mark.parametrize("seed", range(20))
def test_random_reservations_and_guesses_keep_the_sums_and_the_budget(seed: int, eviction: EvictionName) -> None:
    rng = random.Random(seed)
    disk, loaded = Disk(), Signal()
    disk.bad.add("e")
    memory = ExpertMemory(
        disk.read,
        budget_bytes=6 * UNIT_BYTES,
        eviction=eviction,
        on_change=loaded,
        num_loaders=2,
        clock=lambda: rng.random() * 20,
    )
    held: list[Reservation] = []
    guesses: list[Prefetch] = []
    for _ in range(250):
        action, units = rng.random(), make_set(rng.choice("abcde"), rng.choice([1, 2, 3]))
        if held and action < 0.4:
            held.pop(rng.randrange(len(held))).release()
        elif guesses and action < 0.5:
            guesses.pop(rng.randrange(len(guesses))).cancel()
        elif action < 0.65:
            guesses.append(memory.prefetch(units))
        else:
            try:
                reservation = memory.reserve(units, priority=rng.choice(list(Priority)))
            except DigestMismatchError:
                reservation = None
            if reservation is not None:
                held.append(reservation)
        memory.check_integrity()
    for reservation in held:
        reservation.release()
    memory.close()
    memory.check_integrity()
    assert memory.statistics().reserved_bytes == 0
