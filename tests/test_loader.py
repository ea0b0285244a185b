"""The loader: urgent jobs first, waiting ones can be raised or withdrawn, running ones end."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from runtime.memory.eviction import make_eviction
from runtime.memory.loader import Loader, Priority


class Bench:
    """One loader thread that is held busy until the test lets it go, so that the order of the rest can be arranged."""

    def __init__(self) -> None:
        self.loader = Loader(self._work, num_threads=1, name="test")
        self.ran: list[str] = []
        self._busy, self._free, self._done = threading.Event(), threading.Event(), threading.Event()
        self.loader.submit(["first"], priority=Priority.DEMAND)
        assert self._busy.wait(10)

    def _work(self, key: str) -> None:
        if key == "first":
            self._busy.set()
            assert self._free.wait(10)
        elif key == "last":
            self._done.set()
        else:
            self.ran.append(key)

    def add(self, key: str, priority: Priority) -> None:
        self.loader.submit([key], priority=priority)

    def finish(self) -> list[str]:
        self.loader.submit(["last"], priority=Priority.GUESS)
        self._free.set()
        assert self._done.wait(10)
        return self.ran

    def close(self) -> None:
        self._free.set()
        self.loader.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def test_urgent_jobs_overtake_and_of_equal_ones_the_oldest_runs_first(bench: Bench) -> None:
    bench.add("guess", Priority.GUESS)
    bench.add("high layer", Priority.DEMAND)
    bench.add("younger", Priority.DEMAND)
    bench.add("confirmed", Priority.CONFIRMED)
    assert bench.finish() == ["high layer", "younger", "confirmed", "guess"]


def test_a_set_is_read_to_its_end_before_another_of_the_same_priority(bench: Bench) -> None:
    bench.loader.submit(["a1", "a2"], priority=Priority.GUESS)
    bench.loader.submit(["b1", "b2"], priority=Priority.CONFIRMED)
    bench.add("c1", Priority.CONFIRMED)
    bench.loader.raise_to(["a1", "a2"], Priority.CONFIRMED)
    assert bench.finish() == ["a1", "a2", "b1", "b2", "c1"], "what is raised is not made younger"


def test_a_waiting_job_can_be_raised_but_not_lowered(bench: Bench) -> None:
    bench.add("a", Priority.CONFIRMED)
    bench.add("b", Priority.GUESS)
    bench.loader.raise_to(["unknown", "b"], Priority.DEMAND)
    bench.loader.raise_to(["a", "b"], Priority.GUESS)
    assert bench.finish() == ["b", "a"]


def test_a_withdrawn_job_never_runs_and_a_running_one_cannot_be_withdrawn(bench: Bench) -> None:
    bench.add("a", Priority.GUESS)
    assert bench.loader.withdraw("a")
    assert not bench.loader.withdraw("a")
    assert not bench.loader.withdraw("first")
    bench.add("a", Priority.GUESS)
    assert bench.finish() == ["a"], "once, although its key was queued twice"


def test_closing_drops_what_waits(bench: Bench) -> None:
    bench.add("a", Priority.DEMAND)
    closing = threading.Thread(target=bench.loader.close)
    closing.start()
    bench._free.set()
    closing.join(10)
    assert not closing.is_alive()
    assert bench.ran in ([], ["a"]), "it may have begun before the close"


def test_lru_gives_up_what_was_used_longest_ago() -> None:
    order = make_eviction("lru")
    for key in ("a", "b", "c", "a"):
        order.used(key, num_bytes=1, load_s=1.0)
    assert list(order.order()) == ["b", "c", "a"]
    order.gone("b", evicted=True)
    assert list(order.order()) == ["c", "a"]


def test_gdsf_keeps_what_is_frequent_small_and_slow_to_load_and_lets_fame_fade() -> None:
    order = make_eviction("gdsf")
    for _ in range(3):
        order.used("frequent", num_bytes=10, load_s=1.0)
    order.used("small", num_bytes=5, load_s=1.0)
    order.used("slow", num_bytes=10, load_s=2.5)
    order.used("plain", num_bytes=10, load_s=1.0)
    assert list(order.order()) == ["plain", "small", "slow", "frequent"]
    for key in ("plain", "small", "slow"):
        order.gone(key, evicted=True)
    order.used("new", num_bytes=10, load_s=1.0)
    assert list(order.order()) == ["frequent", "new"], "an old favourite is no longer above a newcomer"


def test_walking_an_order_part_of_the_way_changes_nothing() -> None:
    for name in ("lru", "gdsf"):
        order = make_eviction(name)
        for key in ("a", "b", "c"):
            order.used((key, 0), num_bytes=1, load_s=1.0)
        walk = order.order()
        assert next(walk) == ("a", 0)
        del walk
        order.gone(("a", 0), evicted=True)
        assert list(order.order()) == [("b", 0), ("c", 0)]


def test_gdsf_forgets_old_priorities_however_often_something_is_used() -> None:
    order = make_eviction("gdsf")
    for count in range(1000):
        order.used(("often" if count % 2 else f"once {count}", 0), num_bytes=1, load_s=1.0)
        if count % 2 == 0:
            order.gone((f"once {count}", 0), evicted=False)
    assert list(order.order()) == [("often", 0)]


def test_a_job_that_runs_takes_over_what_would_run_next_as_long_as_it_is_alike(bench: Bench) -> None:
    for key in ("a1", "a2", "gone", "a3", "b1", "a4"):
        bench.add(key, Priority.GUESS)
    bench.loader.withdraw("gone")
    bench.loader.raise_to(["a3"], Priority.DEMAND)
    assert bench.loader.take_next(2, lambda key: str(key).startswith("a")) == ["a3", "a1"]
    assert bench.loader.take_next(9, lambda key: str(key).startswith("a")) == ["a2"]
    assert bench.loader.take_next(9, lambda key: str(key).startswith("a")) == [], "b1 would run next"
    assert bench.finish() == ["b1", "a4"]


def test_jobs_that_are_submitted_together_are_all_queued_before_the_first_of_them_runs() -> None:
    taken: list[list[str]] = []
    done = threading.Event()

    def work(_key: str) -> None:
        taken.append(loader.take_next(9, lambda _other: True))
        done.set()

    loader = Loader(work, num_threads=1, name="test")
    for _ in range(20):
        done.clear()
        loader.submit(["a", "b", "c"], priority=Priority.GUESS)
        assert done.wait(10)
    loader.close()
    assert taken == [["b", "c"]] * 20
