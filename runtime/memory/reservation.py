"""A reservation: the visible set of one sequence, in use until it is released. A prefetch: a guess at one.

They know nothing of threads or budgets; `runtime.memory.memory` fills them under its lock.
Read first: a reservation ends ready or failed, and either way must be released; `release` and `cancel` are idempotent.
"""

from __future__ import annotations

from collections.abc import Callable

from runtime.errors import GreenroomError
from runtime.memory.keys import ROUTERS, UnitKey
from runtime.memory.wanted import Held, VisibleSet
from runtime.model.expert import Expert
from runtime.model.mixture import Mixture


class Reservation:
    """Made by `ExpertMemory.reserve` alone.

    Attributes:
        keys: what is reserved.
        error: why it failed, or None.
        ready: everything is in memory.
        load_s: seconds from reserving until ready.
        released: everything has been given back.
    """

    def __init__(self, visible: VisibleSet, *, started: float, on_release: Callable[[Reservation], None]) -> None:
        self.keys: tuple[UnitKey, ...] = tuple(wanted.key for wanted in visible.wanted)
        self.error: GreenroomError | None = None
        self.ready = False
        self.load_s = 0.0
        self._routers = visible.routers
        self._bytes = {wanted.key: wanted.num_bytes for wanted in visible.wanted}
        self._started = started
        self._on_release = on_release
        self.released = False
        self._held: dict[UnitKey, Held] = {}
        self._read: set[UnitKey] = set()

    def expert(self, digest: str, layer: int) -> Expert:
        """Return a reserved expert; only once it is loaded."""
        expert = self._held[digest, layer]
        assert isinstance(expert, Expert), "a layer holds experts"
        return expert

    def mixture(self) -> Mixture | None:
        """The task's routers; None while they are not in memory."""
        mixture = None if self._routers is None else self._held.get(self._routers)
        assert mixture is None or isinstance(mixture, Mixture), "routers lie at their own key"
        return mixture

    def mixtures(self) -> tuple[Mixture, ...] | None:
        """All routers that are reserved, in the order of `keys`; None while any of them is not in memory."""
        held = [self._held.get(key) for key in self.keys if key[1] == ROUTERS]
        mixtures = tuple(value for value in held if isinstance(value, Mixture))
        return mixtures if len(mixtures) == len(held) else None

    def next_missing_layer(self) -> int | None:
        """The lowest layer of which a unit is not in memory yet, -1 for routers; None once the reservation is ready."""
        if self.ready:
            return None
        missing = (layer for digest, layer in self.keys if (digest, layer) not in self._held)
        return min(missing, default=max(layer for _, layer in self.keys))

    def expert_sets(self) -> tuple[str, ...]:
        """Digests of the visible expert sets."""
        return tuple(dict.fromkeys(digest for digest, layer in self.keys if layer != ROUTERS))

    def bytes_read(self, digest: str) -> int:
        """Bytes of this expert set that came from disk for this reservation, guessed before it or while it waited."""
        return sum(self._bytes[key] for key in self._read if key[0] == digest)

    def num_layers(self, digest: str) -> int:
        """How many layers of this expert set are reserved."""
        return sum(key[0] == digest for key in self.keys)

    def release(self) -> None:
        """Give everything back; idempotent."""
        if not self.released:
            self.released = True
            self._held.clear()
            self._on_release(self)

    # ---- for ExpertMemory, under its lock

    def add(self, key: UnitKey, value: Held, *, read: bool) -> None:
        """Something is in memory."""
        if not self.released:
            self._held[key] = value
            if read:
                self._read.add(key)

    def fail(self, error: GreenroomError | None) -> None:
        """Something could not be loaded; the first reason stays."""
        self.error = self.error or error

    def complete_if_ready(self, now: float) -> None:
        """Become ready if nothing is missing any more."""
        if not self.ready and self.error is None and len(self._held) == len(self._bytes):
            self.load_s = now - self._started
            self.ready = True


class Prefetch:
    """Made by `ExpertMemory.prefetch` alone.

    Attributes:
        keys: what it names.
    """

    def __init__(self, keys: tuple[UnitKey, ...], *, on_cancel: Callable[[Prefetch], None]) -> None:
        self.keys = keys
        self._on_cancel = [on_cancel]

    def cancel(self) -> None:
        """The guess is over; what was to be read for it alone, and has not been begun, is not read. Idempotent."""
        try:
            on_cancel = self._on_cancel.pop()  # one thread gets it
        except IndexError:
            return
        on_cancel(self)
