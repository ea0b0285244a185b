"""Residents: what people keep in memory by order: pins, reads ahead of need, evictions by hand.

It knows nothing of sequences; it looks tasks up in the current generation.
Read first: a pin is a reservation that nobody releases but `unpin`. It follows its task: after a publish it holds what
the new generation names, where that finds room, and else what it held before.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from runtime.engine.options import EngineOptions
from runtime.engine.step_protocol import StepModel
from runtime.errors import GreenroomError, InvalidInputError, NoRoomError
from runtime.memory.keys import routers_name
from runtime.memory.loader import Priority
from runtime.memory.memory import ExpertMemory
from runtime.memory.reservation import Reservation
from runtime.memory.slab_tier import make_tier
from runtime.memory.visible import VisibleSets
from runtime.model.generation import Generation

_log = logging.getLogger(__name__)


class Residents:
    """Pins by task. Safe to share between threads.

    Args:
        memory: of the engine.
        visible: says what a task wants.
        current: gives the generation in which tasks are looked up.
    """

    def __init__(self, memory: ExpertMemory, visible: VisibleSets, *, current: Callable[[], Generation]) -> None:
        self._memory = memory
        self._visible = visible
        self._current = current
        self._lock = threading.Lock()
        self._pins: dict[str, Reservation] = {}

    def pinned(self) -> tuple[str, ...]:
        """Tasks that are pinned, by name."""
        with self._lock:
            return tuple(sorted(self._pins))

    def pin(self, task: str) -> None:
        """Hold a task's routers and visible set in memory until `unpin`; reading begins now. Idempotent.

        Raises:
            UnknownTaskError: no such task.
            RepertoireError: it is quarantined.
            BudgetError: it can never fit beside what is pinned and kept for tenants.
            NoRoomError: running requests hold too much of the budget now.
        """
        with self._lock:
            if task not in self._pins:
                self._pins[task] = self._reserve(self._current(), task)

    def unpin(self, task: str) -> None:
        """Let go of a pinned task; what it held stays until its room is needed.

        Raises:
            InvalidInputError: it is not pinned.
        """
        with self._lock:
            if task not in self._pins:
                raise InvalidInputError("task", task, f"is not pinned; pinned are {sorted(self._pins)}")
            self._memory.unpin(self._pins.pop(task))

    def prefetch(self, task: str) -> None:
        """Begin to read what is absent of a task, at the lowest priority; nothing is held for it.

        Raises:
            UnknownTaskError, RepertoireError: no such task, or it is quarantined.
        """
        self._memory.prefetch(self._visible.of(self._current(), task), guess=False)

    def evict(self, task: str) -> int:
        """Drop a task's own routers and expert set from memory, as far as no request holds them.

        Returns:
            bytes that became free.

        Raises:
            UnknownTaskError: no such task.
            InvalidInputError: it is pinned.
        """
        manifest = self._current().manifest
        entry = manifest.task(task)
        with self._lock:
            if task in self._pins:
                raise InvalidInputError("task", task, "is pinned; unpin it first")
            routers = routers_name(entry.router.digest, generation=manifest.generation, task=task)
            return self._memory.evict({routers, *((entry.experts,) if entry.experts else ())})

    def published(self, generation: Generation, served: tuple[Generation, ...]) -> None:
        """Another generation is current: quarantined things may be tried again, pins move on, what is gone retires.

        Args:
            generation: the current one.
            served: it, and all older ones that are still in use.
        """
        self._memory.forgive()
        with self._lock:
            for task, old in list(self._pins.items()):
                try:
                    self._pins[task] = self._reserve(generation, task)
                except GreenroomError as error:
                    number = generation.manifest.generation
                    _log.warning("pin of task %s: not moved to generation %d: %s", task, number, error)
                    if task in generation.manifest.task_names():
                        continue
                    del self._pins[task]
                self._memory.unpin(old)
        self.retired(served)

    def retired(self, served: tuple[Generation, ...]) -> None:
        """Let memory forget what none of the generations that are still in use names."""
        self._memory.retire_all_but(_named_by(served))

    def close(self) -> None:
        """Let go of all pins; idempotent."""
        with self._lock:
            while self._pins:
                self._memory.unpin(self._pins.popitem()[1])

    def _reserve(self, generation: Generation, task: str) -> Reservation:
        visible = self._visible.of(generation, task)
        reservation = self._memory.reserve(visible, priority=Priority.CONFIRMED, pin=True)
        if reservation is None:
            raise NoRoomError(f"task {task}: running requests hold too much of the expert memory now")
        return reservation


def make_memory(options: EngineOptions, model: StepModel, *, on_change: Callable[[], None]) -> ExpertMemory:
    """The expert memory of an engine that computes with `model`."""
    return ExpertMemory(
        budget_bytes=options.expert_budget_bytes,
        eviction=options.eviction,
        num_loaders=options.num_loaders,
        floors=options.tenant_floors,
        tier=make_tier(model.device, model.dtype, options.device_budget_bytes),
        on_change=on_change,
    )


def _named_by(generations: tuple[Generation, ...]) -> frozenset[str]:
    """Digests of the expert sets and keys of the routers that these generations name."""
    manifests = [generation.manifest for generation in generations]
    sets = {entry.digest for manifest in manifests for entry in manifest.experts}
    named = {
        routers_name(task.router.digest, generation=manifest.generation, task=task.name)
        for manifest in manifests
        for task in manifest.tasks
    }
    return frozenset(sets | named)
