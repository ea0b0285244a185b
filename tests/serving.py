"""A real server on a free port, in a thread with its own event loop, for the time of a `with` block.

It does not know what the engine does.
Read first: everything that waits does so with a limit, so a hang is a failure and not a stuck test run.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import Any, Self

from runtime.service.guard import Guard
from runtime.service.http_front import HttpFront
from runtime.service.server import Server

LIMIT_S = 20.0


class Serving:
    """Serves `engine`; `target` is "host:port" once the block is entered, and with `http` `url` is that over HTTP."""

    def __init__(self, engine: Any, *, until_ready: bool = True, http: bool = False, **options: Any) -> None:
        self._engine = engine
        self._http = http
        self._until_ready = until_ready
        self._options = {"host": "127.0.0.1", "port": 0, "grace_s": 5.0} | options
        self._bound: Future[int] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="serving")

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._leave = asyncio.Event()
        front: HttpFront | None = None
        try:
            guard = self._options.setdefault("guard", Guard())
            self.server = Server(self._engine, **self._options)
            port = await self.server.start()
            if self._http:
                front = HttpFront(self.server, guard, host="127.0.0.1", port=0, tls=self._options.get("tls"))
                await front.start()
                self.url = front.url
            if self._until_ready:
                await self.server.wait_ready()
        except BaseException as error:
            self._bound.set_exception(error)
            raise
        self._bound.set_result(port)
        await self._leave.wait()
        await self.server.stop()
        if front is not None:
            await front.stop()

    def __enter__(self) -> Self:
        self._thread.start()
        self.target = f"127.0.0.1:{self._bound.result(LIMIT_S)}"
        return self

    def wait_ready(self) -> None:
        asyncio.run_coroutine_threadsafe(self.server.wait_ready(), self._loop).result(LIMIT_S)

    def begin_stop(self) -> Future[None]:
        """Start draining; the result says when it is over."""
        return asyncio.run_coroutine_threadsafe(self.server.stop(), self._loop)

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._leave.set)
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive(), "the server did not stop"
