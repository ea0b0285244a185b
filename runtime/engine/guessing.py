"""Guesses at tasks, made on a thread of their own.

It knows nothing of what a guess is; `runtime.engine.casting` makes one.
Read first: whoever submits goes on at once. What arrives together then begins in one step, which costs little more than
the step of one; a guess in between would let the first begin alone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

from runtime.engine.sequence import Phase, Sequence

_log = logging.getLogger(__name__)


class Guessing:
    """A thread, and the sequences that it has not come to yet.

    Args:
        guess: guesses the task of a sequence and begins to read its experts.

    It does nothing until `start`.
    """

    def __init__(self, guess: Callable[[Sequence], None]) -> None:
        self._guess = guess
        self._arrived: SimpleQueue[Sequence | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="guessing", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def add(self, sequence: Sequence) -> None:
        """A sequence has arrived. What is known of it, or has ended, by the time of its turn is passed over."""
        self._arrived.put(sequence)

    def close(self) -> None:
        """End the thread; idempotent."""
        self._arrived.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while (sequence := self._arrived.get()) is not None:
            if sequence.decided or sequence.phase is Phase.ENDED:
                continue
            try:
                self._guess(sequence)
            except Exception:  # noqa: BLE001 - a defect costs the guess, not the thread, and is told
                _log.exception("request %s: its task could not be guessed", sequence.request.request_id)
