"""Between asyncio and the engine's thread: one engine request as an asynchronous stream of events.

It knows nothing of gRPC or protobuf; any front end on the same event loop can use it.
Read first: submitting tokenises, so it runs in a thread of its own pool; events come back through a `Mailbox`, which
does not wake the event loop for every one. Leaving the stream before its last event cancels the engine request
exactly once; what it used is counted and charged when the engine says that it has ended, read or not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from runtime.engine.request import TokenDelta
from runtime.service.event_stream import EventStream, Told
from runtime.service.mailbox import Mailbox
from runtime.service.open_requests import OpenRequests

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from runtime.engine.engine import Engine
    from runtime.engine.request import Request


class Answers:
    """Opens event streams on one engine, for one event loop.

    Args:
        engine: started and closed by its owner.
        num_threads: requests that are tokenised at the same time; more of them wait.
        coalesce_s: seconds that tokens may wait to go together with those that follow; 0 lets none wait. What comes
            first of an answer, and its end, never wait.
        teller: makes for each request, in the task that opens it, what hears of its events.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        num_threads: int,
        coalesce_s: float = 0.0,
        teller: Callable[[], Told] = lambda: lambda _event: None,
    ) -> None:
        self._engine = engine
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="greenroom-submit")
        self._coalesce_s = coalesce_s
        self._teller = teller
        self._mailbox: Mailbox | None = None
        self.open_requests = OpenRequests()

    @asynccontextmanager
    async def open(self, request: Request) -> AsyncGenerator[EventStream, None]:
        """Submit `request`; its events are in the stream, and it is over, one way or the other, when the block ends.

        Raises:
            GreenroomError: the engine refuses the request.
        """
        loop = asyncio.get_running_loop()
        if self._mailbox is None:
            self._mailbox = Mailbox(loop, window_s=self._coalesce_s)
        with self.open_requests.opened(self._teller()) as opened:
            stream = opened.stream = EventStream(opened.hear, merge=self._coalesce_s > 0)
            async with self._submitted(request, stream, loop):
                yield stream

    @asynccontextmanager
    async def _submitted(
        self, request: Request, stream: EventStream, loop: asyncio.AbstractEventLoop
    ) -> AsyncGenerator[None, None]:
        assert self._mailbox is not None

        def abandon(submission: asyncio.Future[None]) -> None:
            accepted = not submission.cancelled() and submission.exception() is None
            if accepted and not stream.ended:
                self._engine.cancel(request.request_id)

        sink = self._mailbox.sink(stream.put, urgent=lambda event: not (stream.begun and isinstance(event, TokenDelta)))
        submission = loop.run_in_executor(self._threads, self._engine.submit, request, sink)
        try:
            # Shielded: a thread cannot be stopped, so whoever leaves now is cancelled when it has submitted.
            await asyncio.shield(submission)
            yield
        finally:
            if not stream.ended:
                submission.add_done_callback(abandon)

    def close(self) -> None:
        """Take no more requests; idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)
