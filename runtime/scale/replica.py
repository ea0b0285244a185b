"""A replica: one engine behind Ray Serve, asked in serialised messages.

It knows nothing of gRPC calls, other replicas or where requests come from.
Read first: an answer is a stream of frames, each a kind byte and a message: `M` and a response, or at the end `E` and a
`google.rpc.Status`. Errors travel as frames, so that the entry can give them back as they are. New generations come
from the repertoire's HEAD, which every replica follows by itself: publishing and rolling back reach all of them. A
client that goes away is cancelled by Serve, all the way to the engine; deadlines end calls in that way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

from greenroom.pb.greenroom.v1 import greenroom_pb2 as pb
from runtime.engine.request import Finished, Located
from runtime.errors import GreenroomError, InvalidInputError
from runtime.scale import http_relay
from runtime.scale.frames import ERROR, MESSAGE, RESIDENT
from runtime.service import convert, replies
from runtime.service.status import rich_status

if TYPE_CHECKING:
    from runtime.engine.engine import Engine
    from runtime.service.event_stream import EventStream


class Follower(Protocol):
    """What follows a repertoire's HEAD."""

    def start(self) -> None:
        """Begin."""


class Replica:
    """What a Serve replica runs.

    Args:
        build: makes the engine, not started.
        follow: makes what publishes new generations to it.
        num_threads: requests tokenised at the same time.
    """

    def __init__(
        self, build: Callable[[], Engine], follow: Callable[[Engine], Follower], *, num_threads: int = 4
    ) -> None:
        from runtime.service.answers import Answers
        from runtime.service.guard import Guard
        from runtime.service.http_app import MAX_BODY_BYTES, app_over
        from runtime.service.models import DEFAULT_NAME, Models

        self._engine = build()
        self._engine.start()
        self._follower = follow(self._engine)
        self._follower.start()
        self._answers = Answers(self._engine, num_threads=num_threads)
        models = Models(self._engine, self._answers, name=DEFAULT_NAME, is_ready=lambda: True)
        self._app = app_over(self._engine, models, self._answers, Guard(), max_body_bytes=MAX_BODY_BYTES)

    async def generate(self, data: bytes, *, request_id: str, task: str | None = None) -> AsyncIterator[bytes]:
        """Answer a serialised `GenerateRequest`.

        Args:
            data: the request.
            request_id: its name.
            task: where the router sent it by; this engine locates for itself, as it does anywhere.
        """
        del task
        message = pb.GenerateRequest.FromString(data)
        try:
            async with self._events(message, request_id) as events:
                async for event in events:
                    yield MESSAGE + replies.response(event, request_id).SerializeToString()
        except GreenroomError as error:
            yield failure(error, request_id)

    async def score(self, data: bytes, *, request_id: str, task: str | None = None) -> AsyncIterator[bytes]:
        """Answer a serialised `ScoreRequest`; arguments as of `generate`."""
        del task
        message = pb.ScoreRequest.FromString(data)
        try:
            located, finished = await self._ends(message, request_id)
            yield MESSAGE + replies.score(located, finished, request_id).SerializeToString()
        except GreenroomError as error:
            yield failure(error, request_id)

    async def locate(self, data: bytes, *, request_id: str, task: str | None = None) -> AsyncIterator[bytes]:
        """Answer a serialised `LocateRequest`; arguments as of `generate`."""
        del task
        message = pb.LocateRequest.FromString(data)
        try:
            located, _ = await self._ends(message, request_id)
            yield MESSAGE + pb.LocateResponse(routing=replies.routing(located, request_id)).SerializeToString()
        except GreenroomError as error:
            yield failure(error, request_id)

    async def describe(self, data: bytes, *, request_id: str, task: str | None = None) -> AsyncIterator[bytes]:
        """Answer a serialised `DescribeRequest`: this replica's engine, whichever it is."""
        del task
        try:
            convert.reject_unknown(pb.DescribeRequest.FromString(data))
            base = self._engine.generation.manifest.base
            statistics = await asyncio.to_thread(self._engine.statistics)
            yield MESSAGE + replies.description(base.name, base.digest, statistics).SerializeToString()
        except GreenroomError as error:
            yield failure(error, request_id)

    @asynccontextmanager
    async def _events(self, message: convert.Asked, request_id: str) -> AsyncGenerator[EventStream, None]:
        """The events of a request; errors of the block name fields as they are called on the wire."""
        request = convert.engine_request(message, request_id=request_id, deadline=None)
        try:
            async with self._answers.open(request) as events:
                yield events
        except InvalidInputError as error:
            raise convert.on_the_wire(error, message) from error

    async def _ends(self, message: convert.Asked, request_id: str) -> tuple[Located, Finished]:
        """The decision and the end of a request that generates nothing."""
        async with self._events(message, request_id) as events:
            kept = [event async for event in events if isinstance(event, Located | Finished)]
        located, finished = kept
        assert isinstance(located, Located), "a request that did not fail is located"
        assert isinstance(finished, Finished), "a request that did not fail ends"
        return located, finished

    async def http(self, scope: http_relay.Message, body: bytes, *, task: str | None = None) -> AsyncIterator[Any]:
        """Answer an HTTP request with ASGI messages; `task` as of `generate`."""
        del task
        async for message in http_relay.run(self._app, scope, body):
            yield message

    def record_routing_stats(self) -> dict[str, Any]:
        """What the router wants to know: the tasks whose whole visible set is in memory, and how much was read."""
        generation, memory = self._engine.generation, self._engine.memory
        resident = [
            task for task in generation.mixtures if not memory.missing_bytes(self._engine.visible.of(generation, task))
        ]
        return {RESIDENT: resident, "loads": memory.statistics().loads}


def failure(error: GreenroomError, request_id: str) -> bytes:
    """The frame of an error."""
    return ERROR + bytes(rich_status(error, request_id).SerializeToString())
