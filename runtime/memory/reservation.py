"""A reservation: the visible set of one sequence, in use until it is released. A prefetch: a guess at one.

They know nothing of threads or budgets; `runtime.memory.memory` fills them under its lock.
Read first: a reservation ends ready or failed, and either way must be released; `release` and `cancel` are idempotent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from runtime.errors import GreenroomError
from runtime.model.expert import Expert
from runtime.model.manifest import ExpertSet, Unit

UnitKey = tuple[str, int]
"""(digest of the expert set, layer)."""


class Reservation:
    """Made by `ExpertMemory.reserve` alone.

    Attributes:
        keys: what is reserved.
        error: why it failed, or None.
        ready: every unit is in memory.
        load_s: seconds from reserving until ready.
    """

    def __init__(
        self,
        units: Sequence[tuple[ExpertSet, Unit]],
        *,
        started: float,
        on_release: Callable[[Reservation], None],
    ) -> None:
        self.keys: tuple[UnitKey, ...] = tuple((entry.digest, unit.layer) for entry, unit in units)
        self.error: GreenroomError | None = None
        self.ready = False
        self.load_s = 0.0
        self._units = {(entry.digest, unit.layer): unit for entry, unit in units}
        self._started = started
        self._on_release = on_release
        self._released = False
        self._experts: dict[UnitKey, Expert] = {}
        self._read: set[UnitKey] = set()

    def expert(self, digest: str, layer: int) -> Expert:
        """Return a reserved expert; only once it is loaded."""
        return self._experts[digest, layer]

    def next_missing_layer(self) -> int | None:
        """The lowest layer of which a unit is not in memory yet; None once the reservation is ready."""
        if self.ready:
            return None
        missing = (layer for digest, layer in self.keys if (digest, layer) not in self._experts)
        return min(missing, default=max(layer for _, layer in self.keys))

    def bytes_read(self, digest: str) -> int:
        """Bytes of this expert set that came from disk for this reservation, guessed before it or while it waited."""
        return sum(self._units[key].bytes for key in self._read if key[0] == digest)

    def num_layers(self, digest: str) -> int:
        """How many layers of this expert set are reserved."""
        return sum(key[0] == digest for key in self.keys)

    def release(self) -> None:
        """Give the units back; idempotent."""
        if not self._released:
            self._released = True
            self._experts.clear()
            self._on_release(self)

    # ---- for ExpertMemory, under its lock

    def add(self, key: UnitKey, expert: Expert, *, read: bool) -> None:
        """A unit is in memory."""
        if not self._released:
            self._experts[key] = expert
            if read:
                self._read.add(key)

    def fail(self, error: GreenroomError | None) -> None:
        """A unit could not be loaded; the first reason stays."""
        self.error = self.error or error

    def complete_if_ready(self, now: float) -> None:
        """Become ready if nothing is missing any more."""
        if not self.ready and self.error is None and len(self._experts) == len(self._units):
            self.load_s = now - self._started
            self.ready = True


class Prefetch:
    """Made by `ExpertMemory.prefetch` alone.

    Attributes:
        keys: what was absent or on its way when the guess was made.
    """

    def __init__(self, keys: tuple[UnitKey, ...], *, on_cancel: Callable[[Prefetch], None]) -> None:
        self.keys = keys
        self._on_cancel = on_cancel
        self._cancelled = False

    def cancel(self) -> None:
        """The guess is over; reads that have not begun for anybody else's sake are withdrawn. Idempotent."""
        if not self._cancelled:
            self._cancelled = True
            self._on_cancel(self)
