"""A server's life in a process: start, tell that it is ready, wait for a signal, drain.

It knows nothing of what is served.
Read first: the first SIGTERM or SIGINT drains; a second one has its default effect and ends the process at once.
"""

from __future__ import annotations

import asyncio
import gc
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from runtime.service.http_front import HttpFront
    from runtime.service.server import Server

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def leave_to_the_end() -> None:
    """Take what is there now out of later garbage collections.

    Modules, weights and routers stay as long as the process; looking through all of them again stops every thread for
    hundreds of milliseconds.
    """
    gc.collect()
    gc.freeze()


async def serve_until_signal(
    server: Server, *, on_ready: Callable[[int], None], front: HttpFront | None = None
) -> None:
    """Run `server` until SIGTERM or SIGINT, then drain it.

    Args:
        server: not yet started.
        on_ready: called with the bound port once requests are taken.
        front: serves the same over HTTP; begins after the server and ends after it has drained.

    Raises:
        GreenroomError: the server could not start.
    """
    loop = asyncio.get_running_loop()
    signalled = asyncio.Event()

    def on_signal() -> None:
        signalled.set()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)

    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal)
    waiting = asyncio.create_task(signalled.wait())
    try:
        port = await server.start()
        if front is not None:
            await front.start()
        ready = asyncio.create_task(server.wait_ready())
        await asyncio.wait({ready, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            await ready
            leave_to_the_end()
            on_ready(port)
            await waiting
        else:
            ready.cancel()
    finally:
        waiting.cancel()
        await server.stop()
        if front is not None:
            await front.stop()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
