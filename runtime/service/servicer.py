"""The calls of `greenroom.v1.Greenroom`: convert, ask the engine, convert back.

It knows nothing of statuses and request ids (see `runtime.service.guard`) or life-cycles (see its `server`).
Read first: a handler never computes; it raises the engine's errors as they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from greenroom.pb.greenroom.v1 import greenroom_pb2 as pb
from greenroom.pb.greenroom.v1 import greenroom_pb2_grpc
from runtime.engine.request import Finished, Located
from runtime.errors import InvalidInputError
from runtime.service import convert, replies
from runtime.service.call import CALL
from runtime.service.request_id import REQUEST_ID

if TYPE_CHECKING:
    from runtime.engine.engine import Engine
    from runtime.service.answers import Answers
    from runtime.service.event_stream import EventStream


class GreenroomServicer(greenroom_pb2_grpc.GreenroomServicer):
    """Answers from one engine.

    Args:
        engine: for `Describe`.
        answers: over the same engine.
    """

    def __init__(self, engine: Engine, answers: Answers) -> None:
        self._engine = engine
        self._answers = answers

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:  # noqa: N802, ANN401
        """Write one routing, then deltas, then one done."""
        async with self._events(request) as events:
            async for event in events:
                await context.write(replies.response(event, REQUEST_ID.get()))

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:  # noqa: N802, ANN401, ARG002
        """Return how likely a continuation is."""
        located, finished = await self._ends(request)
        return replies.score(located, finished, REQUEST_ID.get())

    async def Locate(self, request: pb.LocateRequest, context: Any) -> pb.LocateResponse:  # noqa: N802, ANN401, ARG002
        """Return the routing of a prompt."""
        located, _ = await self._ends(request)
        return pb.LocateResponse(routing=replies.routing(located, REQUEST_ID.get()))

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:  # noqa: N802, ANN401, ARG002
        """Return what is served and how it is doing."""
        convert.reject_unknown(request)
        base = self._engine.generation.manifest.base
        return replies.description(base.name, base.digest, await asyncio.to_thread(self._engine.statistics))

    @asynccontextmanager
    async def _events(self, message: convert.Asked) -> AsyncGenerator[EventStream, None]:
        """The events of a request; errors of the block name fields as they are called on the wire."""
        call = CALL.get()
        request = convert.engine_request(
            message, request_id=REQUEST_ID.get(), deadline=call.deadline, tenant=call.principal.tenant
        )
        try:
            async with self._answers.open(request) as events:
                yield events
        except InvalidInputError as error:
            raise convert.on_the_wire(error, message) from error

    async def _ends(self, message: convert.Asked) -> tuple[Located, Finished]:
        """The decision and the end of a request that generates nothing."""
        located: Located | None = None
        finished: Finished | None = None
        async with self._events(message) as events:
            async for event in events:
                located = event if isinstance(event, Located) else located
                finished = event if isinstance(event, Finished) else finished
        assert located is not None, "a request that did not fail is located"
        assert finished is not None, "a request that did not fail ends"
        return located, finished
