"""The generations that an engine serves: the current one for new requests, older ones until their last request ends.

It knows nothing of sequences or disks; who publishes a generation says what to do when it retires.
Read first: a request keeps the generation it began with, so nothing that it was promised changes while it runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from runtime.errors import InvalidInputError, UnavailableError
from runtime.model.generation import Generation


@dataclass
class _Served:
    generation: Generation
    retire: Callable[[], None]
    users: int = 0


class Generations:
    """Counts the users of each generation; safe to share between threads.

    Args:
        first: the generation to begin with.
        retire: called once when it has been replaced and nobody uses it any more.
        on_retire: called before that with the generations that are still in use.

    Raises:
        InvalidInputError: its locator reads prompts where the engine does not stop to look.
    """

    def __init__(
        self,
        first: Generation,
        *,
        retire: Callable[[], None],
        on_retire: Callable[[tuple[Generation, ...]], None] = lambda _served: None,
    ) -> None:
        _check_locatable(first)
        self._lock = threading.Lock()
        self._current = _Served(first, retire)
        self._closed = False
        self._on_retire = on_retire
        self._served = {first.manifest.generation: self._current}

    @property
    def current(self) -> Generation:
        """What new requests get."""
        with self._lock:
            return self._current.generation

    def numbers(self) -> tuple[int, ...]:
        """Numbers of all that are in use, ascending."""
        with self._lock:
            return tuple(sorted(self._served))

    def served(self) -> tuple[Generation, ...]:
        """All that are in use."""
        with self._lock:
            return tuple(served.generation for served in self._served.values())

    def publish(self, generation: Generation, *, retire: Callable[[], None]) -> None:
        """Make `generation` the current one; the one before it retires when its last request has ended.

        Raises:
            InvalidInputError: it cannot replace the current one in a running engine: another base, another first expert
                layer, or the same number; or its locator reads where the engine does not stop.
        """
        new, old = generation.manifest, self.current.manifest
        if (new.base.digest, new.base.tokenizer_digest) != (old.base.digest, old.base.tokenizer_digest):
            raise InvalidInputError("base", new.base.name, f"generation {new.generation} was made for another base")
        if new.first_layer != old.first_layer:
            raise InvalidInputError("first_layer", new.first_layer, f"the engine runs with {old.first_layer}")
        _check_locatable(generation)
        with self._lock:
            if new.generation in self._served:
                raise InvalidInputError("generation", new.generation, "is being served already")
            before, self._current = self._current, _Served(generation, retire)
            self._served[new.generation] = self._current
        self._retire_if_unused(before)

    def enter(self) -> Generation:
        """Begin to use the current generation.

        Raises:
            UnavailableError: closed.
        """
        with self._lock:
            if self._closed:
                raise UnavailableError("the engine is closed")
            self._current.users += 1
            return self._current.generation

    def leave(self, generation: Generation) -> None:
        """Stop using what `enter` gave."""
        with self._lock:
            served = self._served[generation.manifest.generation]
            served.users -= 1
            assert served.users >= 0, "left more often than entered"
        self._retire_if_unused(served)

    def close(self) -> None:
        """Retire the current generation too, when its last request has ended. Idempotent."""
        with self._lock:
            self._closed = True
            remaining = list(self._served.values())
        for served in remaining:
            self._retire_if_unused(served)

    def _retire_if_unused(self, served: _Served) -> None:
        with self._lock:
            number = served.generation.manifest.generation
            needed = served.users or (served is self._current and not self._closed)
            if needed or self._served.pop(number, None) is None:
                return
        self._on_retire(self.served())
        served.retire()


def _check_locatable(generation: Generation) -> None:
    locator, first_layer = generation.manifest.locator, generation.manifest.first_layer
    readable = {"residual_mean": (0, first_layer), "residual_parts": (first_layer,)}
    if locator.layer not in readable.get(locator.feature, ()):
        raise InvalidInputError(
            "locator.feature",
            f"{locator.feature} at layer {locator.layer}",
            f"the engine locates from the mean over a prompt of what enters layer 0 or {first_layer}, or parts of it",
        )
