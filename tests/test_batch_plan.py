"""The plan of an offline run: every row once, tasks together, no shard larger than a worker's memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runtime.batch.plan import make_plan
from runtime.batch.progress import Pace, Progress

SIZES = {
    "red": {("a", 0): 10, ("a", 1): 10},
    "green": {("a", 0): 10, ("a", 1): 10, ("b", 0): 5},
    "blue": {("c", 0): 30},
}


@given(
    tasks=st.lists(
        st.tuples(st.sampled_from(["red", "green", "blue", "unknown", None]), st.integers(1, 50)), max_size=60
    ),
    budget=st.integers(30, 60),
    shard_rows=st.integers(1, 20),
)
def test_every_row_is_in_one_shard_and_every_shard_fits(
    tasks: list[tuple[str | None, int]], budget: int, shard_rows: int
) -> None:
    rows = [(number, task, length) for number, (task, length) in enumerate(tasks)]
    plan = make_plan(rows, sizes=SIZES, budget_bytes=budget, shard_rows=shard_rows)
    assert sorted(row for shard in plan for row in shard.rows) == list(range(len(rows)))
    assert [shard.number for shard in plan] == list(range(len(plan)))
    order = [tasks[row][0] for shard in plan for row in shard.rows]
    assert order == sorted(order, key=[None, "red", "green", "blue", "unknown"].index), "tasks are not torn apart"
    for shard in plan:
        assert 0 < len(shard.rows) <= shard_rows
        assert set(shard.tasks) == {tasks[row][0] for row in shard.rows}
        units = {unit: size for task in shard.tasks for unit, size in SIZES.get(task or "", {}).items()}
        assert sum(units.values()) <= budget


def test_within_a_task_the_longest_rows_come_first() -> None:
    plan = make_plan([(0, "red", 5), (1, "red", 9), (2, "red", 9)], sizes=SIZES, budget_bytes=99, shard_rows=9)
    assert [list(shard.rows) for shard in plan] == [[1, 2, 0]]


def test_a_task_that_no_memory_could_hold_has_shards_of_its_own() -> None:
    plan = make_plan([(0, "red", 5), (1, "blue", 9)], sizes=SIZES, budget_bytes=20, shard_rows=9)
    assert [(list(shard.rows), shard.tasks) for shard in plan] == [([0], ("red",)), ([1], ("blue",))]


def test_the_pace_counts_what_this_process_did_and_says_when_it_will_be_done() -> None:
    now = [0.0]
    seen: list[Progress] = []
    pace = Pace("answering", total=100, done=40, report=seen.append, clock=lambda: now[0])
    now[0] = 2.0
    pace.add(20)
    assert (seen[0].done, seen[0].eta_s, seen[0].rows_per_s) == (40, None, 0.0)
    assert (seen[1].done, seen[1].eta_s, seen[1].rows_per_s) == (60, 4.0, 10.0)
