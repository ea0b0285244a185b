"""Follows the HEAD of a repertoire: each new generation is opened, checked and published to the running engine.

It knows nothing of how generations are made or requests answered.
Read first: opening happens on the follower's own thread, never on the engine's. A generation that cannot be opened is
logged and left alone; the engine goes on with what it has, and the next one is tried when HEAD moves again, or the
same one when somebody signs it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack

from runtime.engine.engine import Engine
from runtime.errors import GenerationMismatchError, GreenroomError, InvalidInputError
from runtime.model.generation import Generation, open_generation
from runtime.model.repertoire import Repertoire
from runtime.model.signature import Signer

_log = logging.getLogger(__name__)


def open_held(repertoire: Repertoire, number: int | None = None) -> tuple[Generation, Callable[[], None]]:
    """Open a generation and hold it, so that no collector removes its blobs while it is served.

    Returns:
        the generation, and what lets go of it.

    Raises:
        RepertoireError: it cannot be read.
    """
    with ExitStack() as stack:
        held = stack.enter_context(repertoire.hold_generation(number))
        generation = open_generation(repertoire, held, routers=False)
        return generation, stack.pop_all().close


class HeadFollower:
    """Looks at HEAD every `interval_s` seconds.

    Args:
        repertoire: to follow.
        engine: gets the generations.
        interval_s: seconds between looks; one look reads a file of a few bytes.
    """

    def __init__(self, repertoire: Repertoire, engine: Engine, *, interval_s: float) -> None:
        self._repertoire = repertoire
        self._engine = engine
        self._interval_s = interval_s
        self._lock = threading.Lock()  # one publishes at a time
        self._refused: tuple[int, bytes | None] | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="head-follower", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Stop looking; idempotent."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def publish(self, *, expected: int, number: int) -> None:
        """Publish what HEAD names, if that is `number` and the engine serves `expected`.

        Raises:
            GenerationMismatchError: the engine serves another generation.
            InvalidInputError: HEAD names another generation, or the engine serves this one already.
            GreenroomError: it cannot be read or served.
        """
        with self._lock:
            self._check_served(expected)
            head = self._repertoire.head()
            if number != head:
                raise InvalidInputError("generation", number, f"the repertoire's newest generation is {head}")
            if number == expected:
                raise InvalidInputError("generation", number, "is being served already")
            self._refused = None
            self._look()

    def rollback(self, *, expected: int, to: int, signer: Signer | None = None) -> int:
        """Make a new generation with the content of an older one and publish it; see `Repertoire.rollback`.

        Returns:
            its number.

        Raises:
            GenerationMismatchError: the engine serves another generation than `expected`, or HEAD names another.
            GreenroomError: the older one is not here, or the new one cannot be served.
        """
        with self._lock:
            self._check_served(expected)
            number = self._repertoire.rollback(expected=expected, to=to, signer=signer).generation
            self._look()
        return number

    def _check_served(self, expected: int) -> None:
        served = self._engine.generation.manifest.generation
        if served != expected:
            raise GenerationMismatchError(f"generation {served} is served, not {expected}")

    def look(self) -> int | None:
        """Publish what HEAD names if it is new.

        Returns:
            the number of the generation that was published, or None.

        Raises:
            GreenroomError: HEAD or its generation cannot be read or served; it is not tried again until HEAD moves or
                the generation's signature changes.
        """
        with self._lock:
            return self._look()

    def _look(self) -> int | None:
        number = self._repertoire.head()
        if number is None or number == self._engine.generation.manifest.generation:
            return None
        candidate = (number, self._repertoire.signature(number))
        if candidate == self._refused:
            return None
        self._refused = candidate
        generation, let_go = open_held(self._repertoire, number)
        try:
            generation.densities.locators()  # here, and not while a request waits
            self._engine.publish(generation, retire=let_go)
        except GreenroomError:
            let_go()
            raise
        self._refused = None
        return number

    def _run(self) -> None:
        while not self._closing.wait(self._interval_s):
            try:
                number = self.look()
            except GreenroomError:
                _log.exception("the newest generation is not served")
            else:
                if number is not None:
                    _log.info("now serving generation %d", number)
