"""Brings events from the engine's thread to an event loop, waking it once for many of them.

It knows nothing of what the events are.
Read first: waking the loop costs a system call and a change of threads; a step of the engine makes an event for every
running request, and all that have come until the loop looks are delivered together, in order.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

Item = TypeVar("Item")


class Mailbox:
    """Delivers on one event loop.

    Args:
        loop: where; when it is closed, what comes is dropped, since nobody is left to tell.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posted: deque[Callable[[], None]] = deque()
        self._waking = False

    def sink(self, deliver: Callable[[Item], None]) -> Callable[[Item], None]:
        """What any thread may call; `deliver` is then called with the same on the event loop."""

        def post(item: Item) -> None:
            self._posted.append(lambda: deliver(item))
            # Posted before the look, and `_deliver` clears the flag before it takes: nothing is left lying.
            if not self._waking:
                self._waking = True
                with suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._deliver)

        return post

    def _deliver(self) -> None:
        self._waking = False
        while self._posted:
            self._posted.popleft()()
