"""Which task a prompt will need, as an entry can know it: the exported locator of the newest generation that has one.

It knows nothing of clusters, and imports no torch.
Read first: it is a hint. Without exports (`greenroom export onnx-features onnx-locator`) it says nothing; with those of
an older generation it says what that knew. HEAD is looked at every few seconds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from greenroom.locate import LocatorFilesError, PromptError, PromptLocator, exports_folder, is_exported

LOOK_EVERY_S = 5.0
_log = logging.getLogger(__name__)


class TaskHint:
    """Call it with a prompt; from any thread.

    Args:
        repertoire: its folder.
        look_every_s: seconds between looks for a newer generation.
        clock: seconds, monotonic.
    """

    def __init__(
        self, repertoire: Path, *, look_every_s: float = LOOK_EVERY_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._repertoire = repertoire
        self._look_every_s = look_every_s
        self._clock = clock
        self._lock = threading.Lock()
        self._folder: Path | None = None
        self._locator: PromptLocator | None = None
        self._look_at = clock()

    def __call__(self, prompt: str) -> str | None:
        """The task; None where none is near, or nothing can be said."""
        locator = self._newest()
        if locator is None:
            return None
        try:
            return locator.locate([prompt])[0].task
        except PromptError:
            return None  # the replica says what is wrong with it

    def _newest(self) -> PromptLocator | None:
        with self._lock:
            if self._clock() >= self._look_at:
                self._look_at = self._clock() + self._look_every_s
                try:
                    folder = exports_folder(self._repertoire)
                    if folder != self._folder and is_exported(folder):
                        self._locator, self._folder = PromptLocator(folder), folder
                except LocatorFilesError as error:
                    _log.warning("requests are routed without a locator, or with an older one: %s", error)
            return self._locator
