"""The requests that are being answered right now, as anybody who may infer may see them.

It knows nothing of prompts, answers or callers, and so cannot tell of them.
Read first: on the event loop only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from runtime.engine.request import Located

if TYPE_CHECKING:
    from runtime.service.event_stream import EventStream, Told


class OpenRequest:
    """One request.

    Args:
        told: hears of its events, too.
        clock: seconds, monotonic.
    """

    def __init__(self, told: Told, clock: Callable[[], float]) -> None:
        self._told = told
        self._clock = clock
        self._started_s = clock()
        self._located: Located | None = None
        self.stream: EventStream | None = None

    def hear(self, event: Any) -> None:  # noqa: ANN401 - what `Told` hears
        """Take note of a decision, and pass every event on."""
        if isinstance(event, Located):
            self._located = event
        self._told(event)

    def shown(self) -> dict[str, Any]:
        """What may be seen of it."""
        answering = self.stream is not None and self.stream.begun
        state = "answering" if answering else "waiting" if self._located is None else "reading the prompt"
        return {
            "state": state,
            "task": self._located.task if self._located is not None else None,
            "how": self._located.how if self._located is not None else None,
            "seconds": round(self._clock() - self._started_s, 3),
        }


class OpenRequests:
    """All of them, oldest first.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open: dict[OpenRequest, None] = {}

    @contextmanager
    def opened(self, told: Told) -> Iterator[OpenRequest]:
        """One request for the time of the block."""
        request = OpenRequest(told, self._clock)
        self._open[request] = None
        try:
            yield request
        finally:
            del self._open[request]

    def shown(self, limit: int) -> list[dict[str, Any]]:
        """What may be seen of the oldest ones, `limit` at most."""
        return [request.shown() for request, _ in zip(self._open, range(limit), strict=False)]
