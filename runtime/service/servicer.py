"""The calls of `greenroom.v1.Greenroom`: convert, ask the engine, convert back.

It knows nothing of statuses and request ids (see `runtime.service.guard`) or life-cycles (see its `server`).
Read first: a handler never computes; it raises the engine's errors as they are.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from greenroom.pb.greenroom.v1 import greenroom_pb2 as pb
from greenroom.pb.greenroom.v1 import greenroom_pb2_grpc
from runtime.engine.request import Located
from runtime.errors import InvalidInputError
from runtime.service import convert
from runtime.service.call import CALL
from runtime.service.request_id import REQUEST_ID

if TYPE_CHECKING:
    from runtime.engine.engine import Engine
    from runtime.service.answers import Answers


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
        request_id = REQUEST_ID.get()
        wanted = convert.generate_request(request, request_id=request_id, deadline=CALL.get().deadline)
        try:
            async with self._answers.open(wanted) as events:
                async for event in events:
                    await context.write(convert.response(event, request_id))
        except InvalidInputError as error:
            raise convert.on_the_wire(error, request) from error

    async def Locate(self, request: pb.LocateRequest, context: Any) -> pb.LocateResponse:  # noqa: N802, ANN401, ARG002
        """Return the routing of a prompt."""
        request_id = REQUEST_ID.get()
        wanted = convert.locate_request(request, request_id=request_id, deadline=CALL.get().deadline)
        located: Located | None = None
        try:
            async with self._answers.open(wanted) as events:
                async for event in events:
                    if isinstance(event, Located):
                        located = event
        except InvalidInputError as error:
            raise convert.on_the_wire(error, request) from error
        assert located is not None, "a request that did not fail is located"
        return pb.LocateResponse(routing=convert.routing(located, request_id))

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:  # noqa: N802, ANN401, ARG002
        """Return what is served and how it is doing."""
        convert.reject_unknown(request)
        base = self._engine.generation.manifest.base
        return convert.description(base.name, base.digest, await asyncio.to_thread(self._engine.statistics))
