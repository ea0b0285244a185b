"""Brings events from the engine's thread to an event loop, without waking it for every one.

It knows nothing of what the events are.
Read first: waking the loop costs a system call and a change of threads, and a step of the engine makes an event for
every running request. What has come until the loop looks is delivered together, in order. With a window the loop, once
woken, looks by itself that often until nothing more comes, and only what is urgent wakes it in between.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

Item = TypeVar("Item")


class Mailbox:
    """Delivers on one event loop.

    Args:
        loop: where; when it is closed, what comes is dropped, since nobody is left to tell.
        window_s: seconds that what is not urgent may wait for more; 0 lets nothing wait.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, *, window_s: float) -> None:
        self._loop = loop
        self._window_s = window_s
        self._posted: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._waking = False
        self._looking = False  # a look is due within the window

    def sink(
        self, deliver: Callable[[Item], None], *, urgent: Callable[[Item], bool] = lambda _item: True
    ) -> Callable[[Item], None]:
        """What any thread may call; `deliver` is then called with the same on the event loop."""

        def post(item: Item) -> None:
            self._posted.append((deliver, item))
            # Posted before the flags are read, and they are cleared before the mail is taken: nothing is left lying.
            if not self._waking and (not self._looking or urgent(item)):
                self._waking = True
                with suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._woken)

        return post

    def _woken(self) -> None:
        self._waking = False
        self._deliver()
        if self._window_s and not self._looking:
            self._looking = True
            self._loop.call_later(self._window_s, self._look)

    def _look(self) -> None:
        if not self._posted:
            self._looking = False
        if self._posted:
            self._looking = True
            self._deliver()
        if self._looking:
            self._loop.call_later(self._window_s, self._look)

    def _deliver(self) -> None:
        while self._posted:
            deliver, item = self._posted.popleft()
            deliver(item)
