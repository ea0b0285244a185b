"""The plan: which rows are answered together, and in which order.

It knows nothing of engines or files.
Read first: rows are ordered by task, in the order in which tasks were added, and within a task by length, the longest
first. That order is cut into shards: a shard is answered by one worker from an idle engine, so it is what is retried,
what is resumed, and what makes answers reproducible. Rows of two tasks may share a shard, to keep batches full, but
only if both tasks' experts fit into memory together.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from runtime.memory.kept_dtype import kept_bytes
from runtime.memory.keys import ROUTERS, UnitKey
from runtime.model.generation import Generation

Sizes = Mapping[str, Mapping[UnitKey, int]]
"""Task -> (unit -> bytes) of its visible set."""


@dataclass(frozen=True)
class Shard:
    """Rows that are answered together.

    Args:
        number: from 0.
        rows: numbers of rows, in the order in which they are answered.
        tasks: their tasks, in order; None is the base alone.
    """

    number: int
    rows: Sequence[int]
    tasks: tuple[str | None, ...]


def unit_sizes(generation: Generation, *, dtype: torch.dtype | None = None) -> Sizes:
    """What each task of a generation needs in memory; tasks that cannot be served need nothing.

    Args:
        generation: of which.
        dtype: that the engine wants experts in, see `runtime.memory.kept_dtype`; None keeps them as they are stored.
    """
    units = {task: generation.task_units(task) for task in generation.mixtures}
    return {
        task: {
            (task, ROUTERS): generation.router_bytes(task),
            **{(entry.digest, unit.layer): kept_bytes(entry, unit, dtype) for entry, unit in seen},
        }
        for task, seen in units.items()
    }


def make_plan(
    rows: Sequence[tuple[int, str | None, int]], *, sizes: Sizes, budget_bytes: int, shard_rows: int
) -> list[Shard]:
    """Order rows and cut them into shards.

    Args:
        rows: (number, task or None, length) of each row to answer.
        sizes: see there; its order is that of the tasks.
        budget_bytes: expert memory of a worker.
        shard_rows: rows of a shard at most, >= 1.
    """
    places = {task: place for place, task in enumerate(sizes, start=1)}
    ordered = sorted(rows, key=lambda row: (_place(places, row[1]), row[1] or "", -row[2], row[0]))
    shards: list[Shard] = []
    numbers = array("Q")
    tasks: list[str | None] = []
    units: dict[UnitKey, int] = {}

    def cut() -> None:
        nonlocal numbers, tasks, units
        if numbers:
            shards.append(Shard(len(shards), numbers, tuple(tasks)))
        numbers, tasks, units = array("Q"), [], {}

    for number, task, _ in ordered:
        if len(numbers) >= shard_rows:
            cut()
        if task not in tasks:
            both = {**units, **sizes.get(task or "", {})}
            if numbers and sum(both.values()) > budget_bytes:
                cut()
                both = dict(sizes.get(task or "", {}))
            units = both
            tasks.append(task)
        numbers.append(number)
    cut()
    return shards


def _place(places: Mapping[str, int], task: str | None) -> int:
    """The base alone comes first, and tasks that nobody knows last."""
    return 0 if task is None else places.get(task, len(places) + 1)
