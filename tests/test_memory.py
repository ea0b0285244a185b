"""Expert memory: budgets, eviction, sharing, failures; checked with reads that the test controls."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch

from runtime.errors import BudgetError, DigestMismatchError, UnavailableError
from runtime.memory.eviction import EvictionName
from runtime.memory.loader import Priority
from runtime.memory.memory import ExpertMemory
from runtime.memory.reservation import Prefetch, Reservation
from runtime.memory.slab_tier import SlabTier
from runtime.memory.slot import State
from runtime.memory.wanted import Held, VisibleSet, Wanted
from runtime.model.expert import Expert, LowRank
from runtime.model.generation import Mixture

UNIT_BYTES = 100


class Disk:
    """Reads that wait until they are allowed, and fail where told."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.reading = threading.Event()
        self.reads: list[tuple[str, int]] = []
        self.bad: set[str | tuple[str, int]] = set()  # sets, or single layers
        self.fetches: list[tuple[int, ...]] = []
        self.fetches_runs = False
        self._fetchers: dict[str, Callable[[Sequence[int]], None]] = {}
        self.fetch_error: Exception | None = None

    def set(self, name: str, num_layers: int = 2) -> VisibleSet:
        """What a task wants that has one expert per layer; layer -1 stands for its routers."""
        wanted = tuple(self._wanted(name, layer) for layer in range(-1, num_layers - 1))
        return VisibleSet(task=name, routers=wanted[0].key, wanted=wanted)

    def _wanted(self, name: str, layer: int) -> Wanted:
        rows = ((1, 1), (1, 1)) if layer >= 0 else ()
        return Wanted(
            key=(name * 64, layer),
            task=name,
            num_bytes=UNIT_BYTES,
            rows=rows,
            read=lambda: self._read(name, layer),
            fetch=self._fetcher(name),
        )

    def _fetcher(self, name: str) -> Callable[[Sequence[int]], None] | None:
        def fetch(layers: Sequence[int]) -> None:
            self.fetches.append(tuple(layers))
            if self.fetch_error is not None:
                raise self.fetch_error

        return self._fetchers.setdefault(name, fetch) if self.fetches_runs else None

    def _read(self, name: str, layer: int) -> Held:
        self.reading.set()
        assert self.gate.wait(10)
        self.reads.append((name, layer))
        if not self.bad.isdisjoint({name, (name, layer)}):
            raise DigestMismatchError(f"{name} is bad")
        if layer < 0:
            return Mixture(task=name, digest=name, top_k=1, routers={})
        return Expert(layer, 1.0, {"gate": LowRank(torch.zeros(1, 1), torch.zeros(1, 1))})


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
        self.wait_until(lambda: self._count >= count)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the end of a load can make true."""
        with self._condition:
            assert self._condition.wait_for(condition, timeout=60)


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def loaded() -> Signal:
    return Signal()


def make_memory(loaded: Signal, *, units: int, clock: object = None, **options: object) -> ExpertMemory:
    extra = {} if clock is None else {"clock": clock}
    return ExpertMemory(budget_bytes=units * UNIT_BYTES, on_change=loaded, **extra, **options)  # type: ignore[arg-type]


def test_a_reservation_reads_its_units_once_and_a_second_one_shares_them(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(loaded, units=4)
    first = memory.reserve(disk.set("a"))
    assert first is not None
    loaded.wait_for(2)
    second = memory.reserve(disk.set("a"))
    assert second is not None
    assert first.ready
    assert second.ready
    assert disk.reads == [("a", -1), ("a", 0)]
    assert first.bytes_read("a" * 64) == 200
    assert second.bytes_read("a" * 64) == 0
    assert memory.statistics().hits == 2
    memory.check_integrity()
    memory.close()


def test_the_least_recently_reserved_set_is_evicted_and_reserved_ones_never_are(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(loaded, units=4)
    held = memory.reserve(disk.set("a"))
    old = memory.reserve(disk.set("b"))
    assert held is not None
    assert old is not None
    loaded.wait_for(4)
    old.release()
    new = memory.reserve(disk.set("c"))
    assert new is not None
    loaded.wait_for(6)
    assert memory.statistics().evictions == 2
    assert held.ready
    assert memory.reserve(disk.set("b")) is None, "a and c hold the whole budget"
    memory.check_integrity()
    new.release()
    assert memory.reserve(disk.set("b")) is not None
    memory.close()


def test_nothing_is_evicted_for_a_set_that_turns_out_bad(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(loaded, units=2)
    good = memory.reserve(disk.set("a"))
    assert good is not None
    loaded.wait_for(2)
    good.release()
    disk.bad.add("b")
    bad = memory.reserve(disk.set("b"))
    assert bad is not None
    loaded.wait_for(4)
    assert isinstance(bad.error, DigestMismatchError)
    assert not bad.ready
    bad.release()
    assert memory.statistics().evictions == 0
    again = memory.reserve(disk.set("a"))
    assert again is not None
    assert again.ready
    memory.check_integrity()
    memory.close()


def test_a_bad_set_stays_quarantined_until_its_time_has_passed(disk: Disk, loaded: Signal) -> None:
    now = [0.0]
    memory = make_memory(loaded, units=4, clock=lambda: now[0])
    disk.bad.add("a")
    bad = memory.reserve(disk.set("a", 1))
    assert bad is not None
    loaded.wait_for(1)
    bad.release()
    with pytest.raises(DigestMismatchError, match="a is bad"):
        memory.reserve(disk.set("a", 1))
    assert len(disk.reads) == 1, "the quarantine answers without the disk"
    disk.bad.clear()
    now[0] = 6.0
    cured = memory.reserve(disk.set("a", 1))
    assert cured is not None
    loaded.wait_for(2)
    assert cured.ready
    memory.check_integrity()
    memory.close()


def test_a_set_larger_than_the_budget_is_refused_for_good(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(loaded, units=1)
    with pytest.raises(BudgetError, match="200 bytes exceed the expert memory of 100 bytes"):
        memory.reserve(disk.set("a"))
    memory.close()
    with pytest.raises(UnavailableError):
        memory.reserve(disk.set("a", 1))


def test_releasing_during_a_load_gives_the_bytes_back(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(loaded, units=2)
    disk.gate.clear()
    early = memory.reserve(disk.set("a"))
    assert early is not None
    early.release()
    early.release()
    assert memory.statistics().reserved_bytes == 0
    other = memory.reserve(disk.set("b"))
    assert other is not None
    disk.gate.set()
    loaded.wait_for(4)
    assert other.ready
    memory.check_integrity()
    memory.close()


@pytest.mark.parametrize("error", [None, DigestMismatchError("x"), OSError("x")], ids=["fetched", "bad", "disk"])
def test_layers_of_a_set_that_are_loaded_one_after_the_other_come_in_one_read_but_are_judged_alone(
    disk: Disk, loaded: Signal, error: Exception | None
) -> None:
    memory = make_memory(loaded, units=9)
    disk.gate.clear()
    disk.fetches_runs, disk.fetch_error = True, error
    first = memory.reserve(disk.set("x", 1))
    assert disk.reading.wait(10)
    assert first is not None
    wanted = memory.reserve(disk.set("a", 5))
    disk.gate.set()
    loaded.wait_for(2)
    assert wanted is not None
    assert wanted.ready
    assert disk.fetches == [(-1, 0, 1, 2, 3)]
    assert all(memory.state(key) is State.READY for key in wanted.keys)
    assert disk.reads[1:] == [("a", layer) for layer in range(-1, 4)]
    memory.check_integrity()
    memory.close()


def test_a_bad_layer_in_a_common_read_fails_alone_and_the_others_come_in(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(loaded, units=9)
    disk.fetches_runs, disk.bad = True, {("a", 1)}
    guess = memory.prefetch(disk.set("a", 4))
    loaded.wait_for(1)
    states = [memory.state(key).value for key in guess.keys]
    assert disk.fetches == [(-1, 0, 1, 2)]
    assert states == ["ready", "ready", "failed", "ready"]
    statistics = memory.statistics()
    assert (statistics.loads, statistics.failures, statistics.resident_bytes) == (3, 1, 300)
    memory.check_integrity()
    memory.close()


def test_layers_of_two_sets_are_never_fetched_together(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(loaded, units=9)
    disk.gate.clear()
    disk.fetches_runs = True
    first = memory.reserve(disk.set("x", 1))
    assert disk.reading.wait(10)
    assert first is not None
    one, two = memory.reserve(disk.set("a", 3)), memory.reserve(disk.set("b", 2))
    disk.gate.set()
    loaded.wait_for(3)
    assert one is not None
    assert two is not None
    assert (one.ready, two.ready) == (True, True)
    assert disk.reads[1:] == [("a", -1), ("a", 0), ("a", 1), ("b", -1), ("b", 0)], "one set, and then the other"
    assert disk.fetches == [(-1, 0, 1), (-1, 0)]
    memory.close()


def test_a_right_guess_is_read_before_it_is_asked_for_and_counted_as_useful(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(loaded, units=4)
    memory.prefetch(disk.set("a"))
    loaded.wait_for(2)
    assert memory.statistics().reserved_bytes == 0
    reservation = memory.reserve(disk.set("a"))
    assert reservation is not None
    assert reservation.ready
    statistics = memory.statistics()
    assert (statistics.prefetch_useful_bytes, statistics.prefetch_wasted_bytes) == (200, 0)
    memory.check_integrity()
    memory.close()


def test_a_wrong_guess_is_withdrawn_unless_it_was_read_and_then_it_goes_first_and_counts_as_wasted(
    disk: Disk, loaded: Signal
) -> None:
    memory = make_memory(loaded, units=2)
    disk.gate.clear()
    guess = memory.prefetch(disk.set("a"))
    assert disk.reading.wait(10)
    guess.cancel()
    guess.cancel()
    right = memory.reserve(disk.set("b"))
    assert right is not None
    disk.gate.set()
    loaded.wait_for(3)
    assert right.ready
    assert disk.reads == [("a", -1), ("b", -1), ("b", 0)], "the first read had begun; the second was withdrawn"
    assert memory.statistics().prefetch_wasted_bytes == 100
    memory.check_integrity()
    memory.close()


def test_a_demand_overtakes_guesses_and_a_guess_that_comes_true_is_not_read_twice(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(loaded, units=8)
    disk.gate.clear()
    guess = memory.prefetch(disk.set("a", 3))
    assert disk.reading.wait(10)
    memory.prefetch(disk.set("b", 1))
    wanted = memory.reserve(disk.set("b", 1))
    assert wanted is not None
    confirmed = memory.reserve(disk.set("a", 3), priority=Priority.CONFIRMED)
    assert confirmed is not None
    guess.cancel()
    disk.gate.set()
    loaded.wait_for(4)
    assert disk.reads == [("a", -1), ("b", -1), ("a", 0), ("a", 1)]
    assert confirmed.ready
    assert memory.statistics().prefetch_useful_bytes == 400
    memory.check_integrity()
    memory.close()


def test_a_guess_never_takes_the_room_of_what_is_reserved(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(loaded, units=2)
    held = memory.reserve(disk.set("a"))
    assert held is not None
    loaded.wait_for(2)
    memory.prefetch(disk.set("b"))
    memory.prefetch(disk.set("c", 3))
    held.release()
    memory.prefetch(disk.set("b"))
    loaded.wait_for(4)
    memory.prefetch(disk.set("d"))
    assert disk.reads == [("a", -1), ("a", 0), ("b", -1), ("b", 0)], "guesses wait for room, and never evict guesses"
    memory.check_integrity()
    memory.close()


def test_what_nobody_waits_for_goes_before_an_open_guess(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(loaded, units=4)
    memory.prefetch(disk.set("a"))
    loaded.wait_for(2)
    leave_idle(memory, disk, "b")
    loaded.wait_for(4)
    memory.prefetch(disk.set("c"))
    loaded.wait_for(6)
    guessed = memory.reserve(disk.set("a"))
    assert guessed is not None
    assert guessed.ready, "b was used later, but a is still a guess that may come true"
    assert memory.statistics().prefetch_wasted_bytes == 0
    memory.check_integrity()
    memory.close()


def test_what_an_open_guess_names_stays_although_it_was_used_longest_ago(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(loaded, units=4)
    leave_idle(memory, disk, "a")
    leave_idle(memory, disk, "b")
    loaded.wait_for(4)
    guess = memory.prefetch(disk.set("a"))
    other = memory.reserve(disk.set("c"))
    assert other is not None
    loaded.wait_for(6)
    assert memory.state(("a" * 64, 0)) is State.READY, "a guess names it"
    assert memory.state(("b" * 64, 0)) is State.ABSENT
    guess.cancel()
    other.release()
    assert memory.reserve(disk.set("d")) is not None
    loaded.wait_for(8)
    assert memory.state(("a" * 64, 0)) is State.ABSENT, "the guess is over"
    statistics = memory.statistics()
    assert (statistics.prefetch_useful_bytes, statistics.prefetch_wasted_bytes) == (0, 0), "nothing was read for it"
    memory.check_integrity()
    memory.close()


def test_a_guess_is_read_only_beside_what_earlier_guesses_name(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(loaded, units=2)
    leave_idle(memory, disk, "a")
    loaded.wait_for(2)
    named = memory.prefetch(disk.set("a"))
    memory.prefetch(disk.set("b"))
    named.cancel()
    memory.prefetch(disk.set("c"))
    loaded.wait_for(4)
    assert disk.reads == [("a", -1), ("a", 0), ("c", -1), ("c", 0)]
    memory.check_integrity()
    memory.close()


def test_a_second_guess_keeps_what_the_first_named_also_where_there_is_no_room_for_more(
    disk: Disk, loaded: Signal
) -> None:
    memory = make_memory(loaded, units=4)
    leave_idle(memory, disk, "a")
    loaded.wait_for(2)
    first = memory.prefetch(disk.set("a"))
    held = memory.reserve(disk.set("b"))
    late = memory.reserve(disk.set("c", 1))
    assert held is not None
    assert late is not None
    second = memory.prefetch(disk.set("a"))
    first.cancel()
    loaded.wait_for(5)
    held.release()
    other = memory.reserve(disk.set("d", 1))
    assert other is not None
    loaded.wait_for(6)
    states = [memory.state((name * 64, layer)) for name, layer in (("a", 0), ("b", -1))]
    assert states == [State.READY, State.ABSENT], "b was used later, but somebody foresees a"
    second.cancel()
    memory.check_integrity()
    memory.close()


def test_a_guess_counts_for_the_floor_of_its_tenant(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(loaded, units=5, floors={"gold": 4 * UNIT_BYTES})
    over = memory.prefetch(disk.set("a"), tenant="gold")
    loaded.wait_for(2)
    over.cancel()
    memory.prefetch(disk.set("a", 3), tenant="gold")
    loaded.wait_for(3)
    assert disk.reads == [("a", -1), ("a", 0), ("a", 1)], "the floor is kept for this"
    memory.prefetch(disk.set("b"))
    memory.prefetch(disk.set("c", 1))
    loaded.wait_for(4)
    assert disk.reads[3:] == [("c", -1)], "and not for others"
    memory.check_integrity()
    memory.close()


def test_what_failed_takes_no_room_from_a_guess_and_what_lies_there_none_from_one_that_names_nothing(
    disk: Disk, loaded: Signal
) -> None:
    memory = make_memory(loaded, units=4)
    disk.bad = {("a", 0)}
    over = memory.prefetch(disk.set("a"))
    loaded.wait_for(2)
    over.cancel()
    held = memory.reserve(disk.set("h"))
    assert held is not None
    loaded.wait_for(4)
    memory.prefetch(disk.set("a", 3))
    loaded.wait_for(5)
    assert disk.reads[-1] == ("a", 1), "one is there, one is bad, and for the third is room"
    memory.evict({"a" * 64})
    leave_idle(memory, disk, "c")
    loaded.wait_for(7)
    memory.prefetch(disk.set("c", 3), guess=False)
    loaded.wait_for(8)
    assert disk.reads[-1] == ("c", 1)
    memory.check_integrity()
    memory.close()


def test_what_is_reserved_takes_the_room_of_guesses_and_a_guess_that_then_finds_none_is_given_up(
    disk: Disk, loaded: Signal
) -> None:
    memory = make_memory(loaded, units=4)
    memory.prefetch(disk.set("a"))
    loaded.wait_for(2)
    disk.gate.clear()
    disk.reading.clear()
    late = memory.prefetch(disk.set("b"))
    assert disk.reading.wait(10)
    held = memory.reserve(disk.set("c", 3))
    assert held is not None
    disk.gate.set()
    loaded.wait_until(lambda: held.ready)
    loaded.wait_until(lambda: memory.state(("b" * 64, 0)) is State.ABSENT)
    assert memory.state(("b" * 64, -1)) is State.READY, "it came when there was room"
    assert memory.statistics().prefetch_wasted_bytes == 300
    late.cancel()
    memory.check_integrity()
    memory.close()


def test_a_reservation_says_from_which_layer_on_something_is_missing(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(loaded, units=4)
    disk.gate.clear()
    reservation = memory.reserve(disk.set("a"))
    assert reservation is not None
    assert reservation.next_missing_layer() == -1
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
        budget_bytes=6 * UNIT_BYTES,
        eviction=eviction,
        on_change=loaded,
        num_loaders=2,
        clock=random_clock(seed),
    )
    held: list[Reservation] = []
    guesses: list[Prefetch] = []
    for _ in range(250):
        action, units = rng.random(), disk.set(rng.choice("abcde"), rng.choice([1, 2, 3]))
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


def test_what_is_pinned_is_never_evicted_and_what_could_not_run_beside_it_is_refused(
    disk: Disk, loaded: Signal
) -> None:
    memory = make_memory(loaded, units=4)
    pinned = memory.reserve(disk.set("a"), pin=True)
    assert pinned is not None
    for name in "bcb":
        other = memory.reserve(disk.set(name))
        assert other is not None
        other.release()
    with pytest.raises(BudgetError, match="300 bytes exceed the expert memory of 400 bytes, of which 200 are kept"):
        memory.reserve(disk.set("d", 3))
    assert memory.statistics().pinned_bytes == 200
    assert [row.task for row in memory.residency() if row.pinned] == ["a"]
    memory.check_integrity()
    memory.unpin(pinned)
    assert memory.statistics().pinned_bytes == 0
    assert memory.reserve(disk.set("d", 3)) is not None
    memory.close()


def test_other_tenants_leave_a_floor_alone_and_may_not_reserve_it(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(loaded, units=6, floors={"gold": 2 * UNIT_BYTES})
    mine = memory.reserve(disk.set("a"), tenant="gold")
    assert mine is not None
    loaded.wait_for(2)
    mine.release()
    for i, name in enumerate("bcdebcde", start=1):
        other = memory.reserve(disk.set(name), tenant="other")
        assert other is not None
        loaded.wait_for(2 + 2 * i)
        other.release()
        memory.check_integrity()
    again = memory.reserve(disk.set("a"), tenant="gold")
    assert again is not None
    assert again.ready, "traffic of others must not evict it"
    again.release()
    with pytest.raises(BudgetError, match="of which 200 are kept for pins and other tenants"):
        memory.reserve(disk.set("b", 5), tenant="other")
    assert memory.reserve(disk.set("b", 6), tenant="gold") is not None, "its own floor is no bound for a tenant"
    memory.close()


def test_a_floor_covers_so_many_bytes_and_no_more(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(loaded, units=4, floors={"gold": 2 * UNIT_BYTES})
    for i, name in enumerate("ab", start=1):
        mine = memory.reserve(disk.set(name), tenant="gold")
        assert mine is not None
        loaded.wait_for(2 * i)
        mine.release()
    other = memory.reserve(disk.set("c"), tenant="other")
    assert other is not None
    loaded.wait_for(6)
    assert other.ready
    states = [memory.state((name * 64, 0)) for name in "abc"]
    assert states == [State.ABSENT, State.READY, State.READY], "what was used last is what the floor keeps"
    memory.check_integrity()
    memory.close()


def test_repeated_failures_wait_longer_and_a_publish_lets_the_next_request_try_at_once(
    disk: Disk, loaded: Signal
) -> None:
    now = [0.0]
    memory = make_memory(loaded, units=4, clock=lambda: now[0], retry_s=1.0)
    disk.bad.add("a")
    for count, wait in enumerate((1.0, 2.0, 4.0), start=1):
        bad = memory.reserve(disk.set("a", 1))
        assert bad is not None
        loaded.wait_for(count)
        bad.release()
        now[0] += wait - 0.01
        with pytest.raises(DigestMismatchError):
            memory.reserve(disk.set("a", 1))
        now[0] += 0.02
    disk.bad.clear()
    assert memory.state(("a" * 64, -1)) is State.FAILED
    failed_again = memory.reserve(disk.set("a", 1))
    assert failed_again is not None
    loaded.wait_for(4)
    assert memory.state(("a" * 64, -1)) is State.READY
    disk.bad.add("b")
    bad = memory.reserve(disk.set("b", 1))
    assert bad is not None
    loaded.wait_for(5)
    bad.release()
    memory.forgive()
    disk.bad.clear()
    assert memory.reserve(disk.set("b", 1)) is not None
    memory.close()


def test_what_no_generation_names_goes_at_once_or_with_its_last_reservation(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(loaded, units=6)
    idle, held = memory.reserve(disk.set("a")), memory.reserve(disk.set("b"))
    assert idle is not None
    assert held is not None
    loaded.wait_for(4)
    idle.release()
    memory.retire_all_but({"c" * 64})
    assert memory.state(("a" * 64, 0)) is State.ABSENT
    assert memory.state(("b" * 64, 0)) is State.RETIRED
    assert memory.statistics().resident_bytes == 200
    memory.check_integrity()
    held.release()
    assert memory.state(("b" * 64, 0)) is State.ABSENT
    assert memory.statistics().resident_bytes == 0
    memory.check_integrity()
    memory.close()


def test_a_set_is_evicted_by_order_only_where_nobody_holds_it(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(loaded, units=6)
    idle, held = memory.reserve(disk.set("a")), memory.reserve(disk.set("b"))
    assert idle is not None
    assert held is not None
    loaded.wait_for(4)
    idle.release()
    assert memory.evict({"a" * 64, "b" * 64}) == 200
    assert (memory.state(("a" * 64, 0)), memory.state(("b" * 64, 0))) == (State.ABSENT, State.READY)
    memory.check_integrity()
    memory.close()


def test_precision_and_recall_follow_from_what_was_guessed_and_what_was_wanted(disk: Disk, loaded: Signal) -> None:
    memory = make_memory(loaded, units=4)
    assert (memory.statistics().prefetch_precision, memory.statistics().prefetch_recall) == (0.0, 0.0)
    memory.prefetch(disk.set("a"))
    memory.prefetch(disk.set("b"))
    loaded.wait_for(4)
    for i, name in enumerate("acd"):
        reservation = memory.reserve(disk.set(name))
        assert reservation is not None
        loaded.wait_for(4 + 2 * i)
        reservation.release()
    statistics = memory.statistics()
    assert (statistics.prefetch_useful_bytes, statistics.demanded_bytes) == (200, 400)
    assert statistics.prefetch_recall == pytest.approx(1 / 3)
    assert statistics.prefetch_precision == pytest.approx(200 / (200 + statistics.prefetch_wasted_bytes))
    memory.close()


def leave_idle(memory: ExpertMemory, disk: Disk, name: str) -> None:
    """Have a set read that nobody holds."""
    reservation = memory.reserve(disk.set(name))
    assert reservation is not None
    reservation.release()


def is_loading(units: Mapping[int, State]) -> bool:
    """Whether any unit is on its way."""
    return State.LOADING in units.values()


def random_clock(seed: int) -> Callable[[], float]:
    """A clock that jumps; its numbers are its own, because loader threads ask it too."""
    rng = random.Random(seed)
    return lambda: rng.random() * 20


class Chaos:
    """Random operations on one memory, one at a time."""

    def __init__(self, memory: ExpertMemory, disk: Disk, loaded: Signal, rng: random.Random) -> None:
        self.memory, self.disk, self.loaded, self.rng = memory, disk, loaded, rng
        self.held: list[Reservation] = []
        self.pins: list[Reservation] = []
        self.guesses: list[Prefetch] = []

    def some_set(self) -> VisibleSet:
        return self.disk.set(self.rng.choice("abcdefgh"), self.rng.choice([1, 2, 3]))

    def some_digests(self, count: int) -> set[str]:
        return {name * 64 for name in self.rng.sample("abcdefgh", count)}

    def reserve(self, *, pin: bool = False) -> None:
        tenant, priority = self.rng.choice(["", "gold", "silver", "tin"]), self.rng.choice(list(Priority))
        try:
            reservation = self.memory.reserve(self.some_set(), priority=priority, tenant=tenant, pin=pin)
        except (DigestMismatchError, BudgetError):
            return
        if reservation is not None:
            (self.pins if pin else self.held).append(reservation)

    def pin(self) -> None:
        self.reserve(pin=True)

    def unpin(self) -> None:
        if self.pins:
            self.memory.unpin(self.pins.pop(self.rng.randrange(len(self.pins))))

    def release(self) -> None:
        if self.held:
            self.held.pop(self.rng.randrange(len(self.held))).release()

    def guess(self) -> None:
        tenant, guess = self.rng.choice(["", "gold"]), self.rng.random() < 0.8
        self.guesses.append(self.memory.prefetch(self.some_set(), tenant=tenant, guess=guess))

    def cancel(self) -> None:
        if self.guesses:
            self.guesses.pop(self.rng.randrange(len(self.guesses))).cancel()

    def evict(self) -> None:
        self.memory.evict(self.some_digests(2))

    def settle(self) -> None:
        """Wait until nothing is on its way, so that what happens does not depend on how fast loader threads are."""
        self.loaded.wait_until(lambda: not any(is_loading(row.units) for row in self.memory.residency()))

    def publish(self) -> None:
        """Some tasks are gone, what was bad may be good, and the other way round."""
        self.memory.retire_all_but(self.some_digests(6))
        self.disk.bad = set(self.rng.sample("abcdefgh", 1))
        self.memory.forgive()


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "slabs"])
def test_ten_thousand_random_loads_evictions_pins_and_publishes_keep_every_sum(*, on_device: bool) -> None:
    rng = random.Random(7)
    disk, loaded = Disk(), Signal()
    slabs = SlabTier(budget_bytes=7 * 2 * 4, dtype=torch.float32, device=torch.device("cpu"), slab_bytes=16)
    memory = ExpertMemory(
        budget_bytes=12 * UNIT_BYTES,
        on_change=loaded,
        num_loaders=2,
        floors={"gold": 2 * UNIT_BYTES, "silver": 3 * UNIT_BYTES},
        tier=slabs if on_device else None,
        clock=random_clock(8),
    )
    chaos = Chaos(memory, disk, loaded, rng)
    actions = [chaos.reserve] * 8 + [chaos.release] * 6 + [chaos.pin, chaos.unpin, chaos.guess, chaos.cancel]
    actions += [chaos.evict, chaos.publish, chaos.settle, chaos.settle]
    for _ in range(10_000):
        rng.choice(actions)()
        memory.check_integrity()
    for reservation in chaos.held:
        reservation.release()
    while chaos.pins:
        chaos.unpin()
    memory.close()
    memory.check_integrity()
    assert memory.statistics().reserved_bytes == 0
    assert memory.statistics().evictions > 100
