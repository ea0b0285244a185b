"""Between asyncio and the engine's thread: one engine request as an asynchronous stream of events.

It knows nothing of gRPC or protobuf; any asyncio front end can use it.
Read first: submitting tokenises, so it runs in a thread of its own pool; events come back through
`loop.call_soon_threadsafe`. Leaving the stream before its last event cancels the engine request exactly once.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from runtime.engine.request import Event, Failed, Finished, Located, TokenDelta

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from runtime.engine.engine import Engine
    from runtime.engine.request import Request


class EventStream:
    """Events of one request, in order, up to and including `Finished`; a `Failed` is raised as its error.

    `ended` says whether the last event has arrived, read or not.
    """

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._read_last = False
        self.ended = False

    def put(self, event: Event) -> None:
        """Take an event from the engine; on the event loop only. Bounded by the tokens a request may generate."""
        self._queue.put_nowait(event)
        self.ended = isinstance(event, Finished | Failed)

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
    """Opens event streams on one engine.

    Args:
        engine: started and closed by its owner.
        num_threads: requests that are tokenised at the same time; more of them wait.
    """

    def __init__(self, engine: Engine, *, num_threads: int) -> None:
        self._engine = engine
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="greenroom-submit")

    @asynccontextmanager
    async def open(self, request: Request) -> AsyncGenerator[EventStream, None]:
        """Submit `request`; its events are in the stream, and it is over, one way or the other, when the block ends.

        Raises:
            GreenroomError: the engine refuses the request.
        """
        loop = asyncio.get_running_loop()
        stream = EventStream()

        def sink(event: Event) -> None:
            # A closed loop has nobody left to tell, and the engine's thread must not suffer from it.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(stream.put, event)

        def abandon(submission: asyncio.Future[None]) -> None:
            accepted = not submission.cancelled() and submission.exception() is None
            if accepted and not stream.ended:
                self._engine.cancel(request.request_id)

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
