"""One HTTP request and its response, as ASGI hands them over: JSON, or a stream of server-sent events.

It knows nothing of what is asked or answered.
Read first: the response begins once; before that an error can still be a status, afterwards only the last event.
The last bytes are kept until `flush`, when the call is over and counted: who asks again at once has its quota back.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any

from runtime.errors import CancelledError, InvalidInputError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

JSON = "application/json"


class Exchange:
    """One request and its response.

    Args:
        scope: of the connection.
        receive: gives the body, and later says that the client has left.
        send: takes the response.
        max_body_bytes: a longer body is refused.
    """

    def __init__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send, *, max_body_bytes: int) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._max_body_bytes = max_body_bytes
        self.response_headers: dict[str, str] = {}
        self.begun = False
        self._last: list[MutableMapping[str, Any]] = []

    @property
    def headers(self) -> dict[str, str]:
        """Of the request, names in lower case; of those given twice the first."""
        headers: dict[str, str] = {}
        for name, value in self._scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
        return headers

    @property
    def peer(self) -> str:
        """Where the request comes from."""
        host, port = self._scope.get("client") or ("", 0)
        return f"http:{host}:{port}"

    async def body(self) -> bytes:
        """The whole body, which must say that it is JSON: a page of another site cannot send that unasked.

        Raises:
            InvalidInputError: it is no JSON, or longer than it may be.
            CancelledError: the client has left.
        """
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != JSON:
            raise InvalidInputError("content-type", kind, f"must be {JSON}")
        body, more = bytearray(), True
        while more:
            message = await self._receive()
            if message["type"] != "http.request":
                raise CancelledError("the client left before its request was complete")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_body_bytes:
                raise InvalidInputError("body", len(body), f"has at most {self._max_body_bytes} bytes")
        return bytes(body)

    async def while_connected(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work` unless the client leaves, which cancels it; only after the body was read.

        Raises:
            CancelledError: the client has left.
        """
        working, leaving = asyncio.create_task(work), asyncio.create_task(self._wait_gone())
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                await working
                return
        finally:
            for task in (working, leaving):
                task.cancel()
            await asyncio.wait({working, leaving})
        raise CancelledError("the client left before the answer was complete")

    def reply(self, content: bytes, *, media_type: str, status: int = 200) -> None:
        """Respond with this, unless it is replaced before it leaves."""
        start = self._start(status, media_type, {"content-length": str(len(content))})
        self._last = [start, {"type": "http.response.body", "body": content}]

    def reply_json(self, value: object, *, status: int = 200) -> None:
        """Respond with this as JSON."""
        self.reply(json.dumps(value).encode(), media_type=JSON, status=status)

    async def event(self, data: str) -> None:
        """Send one event; the first one begins the stream."""
        if not self.begun:
            self.begun = True
            await self._send(self._start(200, "text/event-stream", {"cache-control": "no-store"}))
        await self._send({"type": "http.response.body", "body": event_bytes(data), "more_body": True})

    def last_event(self, data: str) -> None:
        """End the stream with this event."""
        self._last = [{"type": "http.response.body", "body": event_bytes(data)}]

    async def flush(self) -> None:
        """Send the last bytes."""
        for message in self._last:
            await self._send(message)

    def _start(self, status: int, media_type: str, headers: dict[str, str]) -> MutableMapping[str, Any]:
        every = {"content-type": media_type, "x-content-type-options": "nosniff", **headers, **self.response_headers}
        pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in every.items()]
        return {"type": "http.response.start", "status": status, "headers": pairs}

    async def _wait_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


def event_bytes(data: str) -> bytes:
    """A server-sent event."""
    return f"data: {data}\n\n".encode()
