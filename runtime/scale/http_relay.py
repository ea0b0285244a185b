"""HTTP through a cluster: an ASGI application that runs in a replica, and the entry's response that repeats it.

It knows nothing of Ray, routes or bodies, beyond what routing by task wants to know.
Read first: the messages that an application sends (`http.response.start`, then `http.response.body`) travel as they
are, one by one, so a stream is a stream on both sides. A client that leaves cancels the entry's response, that the
call, and that the application.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from starlette.responses import Response

from runtime.service.http_exchange import event_bytes

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]
_CARRIED = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")


def is_served(path: str) -> bool:
    """Whether a cluster answers at this path; the page and the metrics are each replica's own."""
    return path.startswith("/v1/") or path in ("/health", "/ready")


def carried(scope: Mapping[str, Any]) -> dict[str, Any]:
    """What a replica needs of a connection: what can be sent, and says what is asked."""
    return {name: scope[name] for name in _CARRIED if name in scope}


def hint_of(path: str, body: bytes) -> tuple[str | None, str | None]:
    """(task, prompt) that an OpenAI body names, as far as they decide where it goes; what is wrong is found later."""
    try:
        fields = json.loads(body) if path.startswith("/v1/") and body else {}
    except ValueError:
        return None, None
    if not isinstance(fields, dict) or fields.get("base_only"):
        return None, None
    task = str(fields.get("model", "")).partition(":")[2] or None
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], dict):
        prompt = messages[0].get("content")
    return task, prompt if isinstance(prompt, str) else None


async def run(app: App, scope: Message, body: bytes) -> AsyncIterator[Message]:
    """What `app` sends in answer to a request."""
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        # Who leaves is not told of, but cancels.
        return unread.pop() if unread else await asyncio.get_running_loop().create_future()

    async def work() -> None:
        try:
            await app(scope, receive, sent.put)
        finally:
            sent.put_nowait(None)

    running = asyncio.create_task(work())
    try:
        while (message := await sent.get()) is not None:
            yield message
        await running
    finally:
        running.cancel()
        await asyncio.wait({running})


class Relayed(Response):
    """A response that sends what another application sent.

    Args:
        first: the first message, already here.
        others: those after it.
        lost: makes an error's object of what ends `others` early; it becomes the last event of a stream of events. Any
            other body ends as it is, and the connection with it, so that nobody takes it for whole.
    """

    def __init__(
        self, first: Message, others: AsyncIterator[Message], lost: Callable[[Exception], dict[str, Any]]
    ) -> None:
        super().__init__()
        self._first = first
        self._others = others
        self._lost = lost

    async def __call__(self, scope: Message, receive: Any, send: Callable[[Message], Awaitable[None]]) -> None:  # noqa: ANN401, ARG002
        """Send all of it."""
        await send(self._first)
        try:
            async for message in self._others:
                await send(message)
        except Exception as error:
            if not _is_event_stream(self._first):
                raise
            await send({"type": "http.response.body", "body": event_bytes(json.dumps(self._lost(error)))})


def _is_event_stream(start: Message) -> bool:
    kinds = (value for name, value in start.get("headers", ()) if name.lower() == b"content-type")
    return any(kind.startswith(b"text/event-stream") for kind in kinds)
