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
from runtime.errors import GreenroomError
from runtime.model.generation import Generation, open_generation
from runtime.model.repertoire import Repertoire

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

    def look(self) -> int | None:
        """Publish what HEAD names if it is new.

        Returns:
            the number of the generation that was published, or None.

        Raises:
            GreenroomError: HEAD or its generation cannot be read or served; it is not tried again until HEAD moves or
                the generation's signature changes.
        """
        number = self._repertoire.head()
        if number is None or number == self._engine.generation.manifest.generation:
            return None
        candidate = (number, self._repertoire.signature(number))
        if candidate == self._refused:
            return None
        self._refused = candidate
        generation, let_go = open_held(self._repertoire, number)
        try:
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
