"""Holding a task: its experts loaded and kept in memory for as long as somebody says so.

It knows nothing of requests.
Read first: requests for a task that is held never wait for a disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from runtime.engine.engine import Engine
from runtime.errors import BudgetError, UnavailableError
from runtime.memory.reservation import Reservation


@contextmanager
def hold(engine: Engine, task: str) -> Iterator[Reservation]:
    """Load a task's visible set, of the engine's current generation, and keep it for the length of the block.

    Raises:
        UnknownTaskError, RepertoireError: the task does not exist, or its experts cannot be loaded.
        BudgetError: they do not fit, or not beside what is held already.
        UnavailableError: the engine was closed meanwhile.
    """
    reservation = engine.memory.reserve(engine.visible.of(engine.generation, task))
    if reservation is None:
        raise BudgetError(f"the experts of {task} do not fit beside those that are held")
    try:
        engine.wait_until(lambda: reservation.ready or reservation.error is not None)
        if reservation.error is not None:
            raise reservation.error
        if not reservation.ready:
            raise UnavailableError("the engine was closed before the experts were loaded")
        yield reservation
    finally:
        reservation.release()
