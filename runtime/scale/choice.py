"""Which replica gets a request: one that has its task in memory, unless that one is much busier than another.

It knows nothing of Ray: replicas are names with a queue length.
Read first: what replicas report of themselves is some seconds old, so what was sent lately counts as resident too. The
same rule is simulated in `benchmarks/scale_sim.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

SPREAD = 4
"""A hot task spreads: so many sequences more than the least loaded replica make a home too busy."""
REMEMBERED = 10_000
"""Tasks whose last replicas are remembered."""

Name = TypeVar("Name")


def choose(homes: Collection[Name], waiting: Mapping[Name, int], *, spread: int) -> list[Name]:
    """Replicas in the order in which they should be tried.

    Args:
        homes: those that have the task in memory, or soon will; others than those of `waiting` are passed over.
        waiting: replica -> sequences in flight there.
        spread: see `SPREAD`.
    """
    by_load = sorted(waiting, key=lambda name: (waiting[name], str(name)))
    home = next((name for name in by_load if name in homes), None)
    if home is None or waiting[home] - waiting[by_load[0]] >= spread:
        return by_load
    return [home, *(name for name in by_load if name != home)]


class Sent:
    """Where each task was sent lately.

    Args:
        limit: tasks remembered; the one that was longest not asked for is forgotten first.
    """

    def __init__(self, limit: int = REMEMBERED) -> None:
        self._limit = limit
        self._tasks: dict[str, set[str]] = {}

    def add(self, task: str, replica: str) -> None:
        """A request for the task went there."""
        replicas = self._tasks.pop(task, set())
        self._tasks[task] = replicas | {replica}
        if len(self._tasks) > self._limit:
            del self._tasks[next(iter(self._tasks))]

    def homes(self, task: str) -> frozenset[str]:
        """Replicas that got requests for the task."""
        return frozenset(self._tasks.get(task, ()))

    def correct(self, replica: str, resident: Collection[str]) -> None:
        """A replica has told what it holds: everything else is not there any more."""
        for task in [task for task, replicas in self._tasks.items() if replica in replicas and task not in resident]:
            self._tasks[task] = self._tasks[task] - {replica}
