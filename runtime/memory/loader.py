"""The loader: threads that do jobs by priority, and jobs that can still be raised or withdrawn while they wait.

It knows nothing of experts; `runtime.memory.memory` says what a job is, and gives it keys.
Read first: a lower number is more urgent, and of equally urgent jobs the oldest runs first, so that of two sets one is
there early instead of both late. A job that has begun is never interrupted; one that waits can be overtaken.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import Generic, TypeVar

Key = TypeVar("Key")


class Priority(IntEnum):
    """How urgently a unit is wanted."""

    DEMAND = 0  # a sequence stands before the layer and waits
    CONFIRMED = 1  # the task is certain, the layer is not reached yet
    GUESS = 2  # speculation on arrival


class Loader(Generic[Key]):
    """A pool of threads over one priority queue.

    Args:
        work: does the job of a key.
        num_threads: jobs that run at the same time.
        name: of the threads.
    """

    def __init__(self, work: Callable[[Key], None], *, num_threads: int, name: str) -> None:
        self._work = work
        self._lock = threading.Condition()
        self._queue: list[tuple[int, int, Key]] = []
        self._jobs: dict[Key, tuple[int, int]] = {}  # priority, number
        self._count = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, keys: Sequence[Key], *, priority: Priority) -> None:
        """Queue the jobs of keys, in the order in which they should run.

        No thread begins before all are queued, so that one that takes over its neighbours (`take_next`) finds them.
        """
        with self._lock:
            for key in keys:
                assert key not in self._jobs, f"{key} is queued already"
                self._count += 1
                self._push(key, priority, self._count)
            self._lock.notify(len(keys))

    def raise_to(self, keys: Iterable[Key], priority: Priority) -> None:
        """Make waiting jobs more urgent, and no younger; nothing happens to those that have begun or are as urgent."""
        with self._lock:
            for key in keys:
                waiting = self._jobs.get(key)
                if waiting is not None and priority < waiting[0]:
                    self._push(key, priority, waiting[1])

    def withdraw(self, key: Key) -> bool:
        """Take a waiting job back; False if it has begun or is unknown."""
        with self._lock:
            return self._jobs.pop(key, None) is not None

    def take_next(self, limit: int, alike: Callable[[Key], bool]) -> list[Key]:
        """Take over the waiting jobs that would run next, as long as they are alike; their caller does them instead.

        Args:
            limit: how many at most.
            alike: whether the job of this key may be taken.
        """
        taken: list[Key] = []
        with self._lock:
            while len(taken) < limit and self._queue:
                priority, number, key = self._queue[0]
                valid = self._jobs.get(key) == (priority, number)
                if valid and not alike(key):
                    break
                heapq.heappop(self._queue)
                if valid:
                    del self._jobs[key]
                    taken.append(key)
        return taken

    def close(self) -> None:
        """Let running jobs finish and drop the waiting ones; idempotent."""
        with self._lock:
            self._closed = True
            self._jobs.clear()
            self._lock.notify_all()
        for thread in self._threads:
            thread.join()

    def _push(self, key: Key, priority: int, number: int) -> None:
        self._jobs[key] = (priority, number)
        heapq.heappush(self._queue, (priority, number, key))

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._closed or self._queue)
                if self._closed:
                    return
                priority, number, key = heapq.heappop(self._queue)
                if self._jobs.get(key) != (priority, number):
                    continue  # withdrawn, or raised: the entry that counts is another one
                del self._jobs[key]
            self._work(key)
