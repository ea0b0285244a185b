"""HTTP's end of the layers: every request that asks for something becomes a `Call` and runs through them.

It knows nothing of what the layers or the calls do.
Read first: the layers surround the sending of the response too, so a call is counted until its stream has ended.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from runtime.service.call import Call, Method, surround
from runtime.service.http_exchange import Exchange, Receive, Send
from runtime.service.http_failures import HttpFailures

if TYPE_CHECKING:
    from runtime.service.guard import Guard

Work = Callable[[Exchange], Awaitable[None]]
"""Reads a request and sends its response; raises what a client is to be told."""

SERVICE = "http"


class HttpCalls:
    """Makes responses that run through the layers.

    Args:
        guard: the layers.
        max_body_bytes: a longer body is refused.
    """

    def __init__(self, guard: Guard, *, max_body_bytes: int) -> None:
        self._guard = guard
        self._max_body_bytes = max_body_bytes

    def respond(self, name: str, work: Work) -> Response:
        """A response that is `work`, surrounded; `name` is what metrics and logs call it."""
        return _Layered(lambda *asgi: self._run(name, work, *asgi))

    async def _run(self, name: str, work: Work, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, max_body_bytes=self._max_body_bytes)
        call = Call(
            method=Method(SERVICE, name, "server_stream"),
            message=None,
            metadata=exchange.headers,
            peer=exchange.peer,
            remaining_s=None,
        )

        async def innermost(_call: Call) -> None:
            await work(exchange)

        await surround(innermost, self._guard.layers(statuses=HttpFailures(exchange)))(call)
        await exchange.flush()


class _Layered(Response):
    def __init__(self, run: Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]) -> None:
        super().__init__()
        self._run = run

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        await self._run(scope, receive, send)
