"""Between asyncio and the engine's thread: one engine request as an asynchronous stream of events.

It knows nothing of gRPC or protobuf; any front end on the same event loop can use it.
Read first: submitting tokenises, so it runs in a thread of its own pool; events come back through a `Mailbox`, which
wakes the event loop once for all events of a step. Leaving the stream before its last event cancels the engine request
exactly once; what it used is counted and charged when the engine says that it has ended, read or not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from runtime.engine.request import Event, Failed, Finished, Located, TokenDelta
from runtime.service.mailbox import Mailbox

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from runtime.engine.engine import Engine
    from runtime.engine.request import Request

Told = Callable[[Located | Finished | Failed], None]
"""Hears of a request's decision and of its end."""


class EventStream:
    """Events of one request, in order, up to and including `Finished`; a `Failed` is raised as its error.

    Args:
        told: hears of the events that are not tokens, on the event loop.

    `ended` says whether the last event has arrived, read or not.
    """

    def __init__(self, told: Told = lambda _event: None) -> None:
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._told = told
        self._read_last = False
        self.ended = False

    def put(self, event: Event) -> None:
        """Take an event from the engine; on the event loop only. Bounded by the tokens a request may generate."""
        self._queue.put_nowait(event)
        if not isinstance(event, TokenDelta):
            self.ended = isinstance(event, Finished | Failed)
            self._told(event)

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Located | TokenDelta | Finished:
        if self._read_last:
            raise StopAsyncIteration
        event = await self._queue.get()
        self._read_last = isinstance(event, Finished | Failed)
        if isinstance(event, Failed):
            raise event.error
        return event


class Answers:
    """Opens event streams on one engine, for one event loop.

    Args:
        engine: started and closed by its owner.
        num_threads: requests that are tokenised at the same time; more of them wait.
        teller: makes for each request, in the task that opens it, what hears of its events.
    """

    def __init__(
        self, engine: Engine, *, num_threads: int, teller: Callable[[], Told] = lambda: lambda _event: None
    ) -> None:
        self._engine = engine
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="greenroom-submit")
        self._teller = teller
        self._mailbox: Mailbox | None = None

    @asynccontextmanager
    async def open(self, request: Request) -> AsyncGenerator[EventStream, None]:
        """Submit `request`; its events are in the stream, and it is over, one way or the other, when the block ends.

        Raises:
            GreenroomError: the engine refuses the request.
        """
        loop = asyncio.get_running_loop()
        if self._mailbox is None:
            self._mailbox = Mailbox(loop)
        stream = EventStream(self._teller())

        def abandon(submission: asyncio.Future[None]) -> None:
            accepted = not submission.cancelled() and submission.exception() is None
            if accepted and not stream.ended:
                self._engine.cancel(request.request_id)

        sink = self._mailbox.sink(stream.put)
        submission = loop.run_in_executor(self._threads, self._engine.submit, request, sink)
        try:
            # Shielded: a thread cannot be stopped, so whoever leaves now is cancelled when it has submitted.
            await asyncio.shield(submission)
            yield stream
        finally:
            if not stream.ended:
                submission.add_done_callback(abandon)

    def close(self) -> None:
        """Take no more requests; idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)
