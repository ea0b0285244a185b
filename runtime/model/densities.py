"""All tasks' densities of a generation, read when somebody first locates.

It knows nothing of prompts; `runtime.model.locator` compares them.
Read first: a generation opens without them, so that a server with thousands of tasks is up as soon as one with five;
they are read once, all of them, by whoever comes first, and everybody else waits for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock, Thread

from runtime.errors import RepertoireError
from runtime.kernels.freed_memory import give_back
from runtime.model.density import Weights, background_shapes, density_shapes, prototype_shapes
from runtime.model.locator import Locator, frame_shapes, projected_width
from runtime.model.manifest import LocatorEntry, LocatorRef, Manifest, Task
from runtime.model.repertoire import Repertoire


class Densities:
    """The locator and the arrival locator of a generation. Safe to share between threads.

    Args:
        repertoire: where they lie.
        manifest: of the generation.
        faults: tasks that are never located, and why; those whose density cannot be read are added.

    Raises:
        RepertoireError: a frame or background, without which nothing can be located, cannot be read.
    """

    def __init__(self, repertoire: Repertoire, manifest: Manifest, faults: dict[str, RepertoireError]) -> None:
        self._repertoire = repertoire
        self._manifest = manifest
        self._frames = {
            ref.frame: repertoire.read_tensors(ref.frame, frame_shapes(manifest.base.width, ref.feature))
            for ref in (manifest.locator, manifest.arrival)
        }
        self._backgrounds = {
            ref.background: repertoire.read_tensors(ref.background, background_shapes(projected_width(ref.feature)))
            for ref in (manifest.locator, manifest.arrival)
            if ref.background is not None
        }
        self._lock = Lock()
        self._made: tuple[Locator, Locator] | None = None
        self.faults = faults

    @property
    def are_read(self) -> bool:
        """Whether `locators` returns at once."""
        return self._made is not None

    def read_ahead(self) -> None:
        """Begin to read on a thread of its own, so that the first who locates waits less.

        The process does not end before it: a thread that is cut off inside torch takes the exit status with it.
        """
        Thread(target=self.locators, name="densities").start()

    def locators(self) -> tuple[Locator, Locator]:
        """The one that decides and the one that guesses on arrival; the first call reads two blobs per task."""
        with self._lock:
            if self._made is None:
                self._made = self._read()
                give_back()  # what was read in small pieces is stacked by now
            return self._made

    def _read(self) -> tuple[Locator, Locator]:
        manifest = self._manifest
        found: list[tuple[Task, Weights, Weights]] = []
        for task in [task for task in manifest.tasks if task.name not in self.faults]:
            try:
                deciding = self._read_one(manifest.locator, task.locator)
                found.append((task, deciding, self._read_one(manifest.arrival, task.arrival)))
            except RepertoireError as error:
                self.faults[task.name] = error
        return (
            self._stack(manifest.locator, {task.name: (tensors, task.locator) for task, tensors, _ in found}),
            self._stack(manifest.arrival, {task.name: (tensors, task.arrival) for task, _, tensors in found}),
        )

    def _read_one(self, ref: LocatorRef, entry: LocatorEntry) -> Weights:
        shapes = density_shapes(ref.density, projected_width(ref.feature))
        tensors = self._repertoire.read_tensors(entry.digest, shapes)
        if entry.prototype is not None:
            tensors |= self._repertoire.read_tensors(entry.prototype, prototype_shapes())
        return tensors

    def _stack(self, ref: LocatorRef, found: Mapping[str, tuple[Weights, LocatorEntry]]) -> Locator:
        entries = [(name, tensors, entry) for name, (tensors, entry) in found.items()]
        background = None if ref.background is None else self._backgrounds[ref.background]
        return Locator(
            self._frames[ref.frame],
            entries,
            score=ref.score,
            density=ref.density,
            beta=ref.beta,
            background=background,
            unit_length=ref.unit_length,
        )
