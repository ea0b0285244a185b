"""The entry of a cluster: every call comes here, is located, and goes to a replica; answers go back as they come.

It knows nothing of engines and imports no torch: the locator is given to it, and replicas are a handle.
Read first: where the entry locates a prompt only decides which replica gets it. The replica locates for itself, so an
entry that has no locator, or an older one, costs reads and never changes an answer. A replica that dies before its
first frame is replaced by another; after that the call ends with UNAVAILABLE, since its beginning has been sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from google.rpc import status_pb2  # type: ignore[import-untyped]
from starlette.responses import JSONResponse

from greenroom.pb.greenroom.v1 import greenroom_pb2 as pb
from runtime.errors import GreenroomError, NotFoundError, UnavailableError
from runtime.scale import http_relay
from runtime.scale.frames import ERROR
from runtime.service.http_failures import error_object
from runtime.service.request_id import chosen_request_id, new_request_id
from runtime.service.status import rich_status

ATTEMPTS = 3
_log = logging.getLogger(__name__)

TaskOf = Callable[[str], str | None]
"""A prompt -> the task that will answer it, or None where that is not known; may take some milliseconds."""


class FailedCall(Exception):  # noqa: N818 - it carries a status, whatever that says
    """A call that ends with a status.

    Args:
        status: `google.rpc.Status`.
    """

    def __init__(self, status: Any) -> None:  # noqa: ANN401 - protobuf without types
        super().__init__(status.message)
        self.status = status


class Entry:
    """What a Serve entry runs.

    Args:
        replicas: handle of the deployment of `runtime.scale.replica.Replica`.
        make_locator: makes the locator; called once.
    """

    def __init__(self, replicas: Any, make_locator: Callable[[], TaskOf]) -> None:  # noqa: ANN401 - Ray's handle
        self._replicas = replicas.options(stream=True)
        self._task_of = make_locator()

    async def Generate(self, request: pb.GenerateRequest, grpc_context: Any) -> AsyncIterator[pb.GenerateResponse]:  # noqa: N802, ANN401
        """Answer over gRPC."""
        try:
            async for frame in self._frames("generate", request, grpc_context.invocation_metadata()):
                yield pb.GenerateResponse.FromString(frame)
        except FailedCall as failed:
            raise _ended(grpc_context, failed) from None

    async def Score(self, request: pb.ScoreRequest, grpc_context: Any) -> pb.ScoreResponse:  # noqa: N802, ANN401
        """Score over gRPC."""
        return pb.ScoreResponse.FromString(await self._ask_once("score", request, grpc_context))

    async def Locate(self, request: pb.LocateRequest, grpc_context: Any) -> pb.LocateResponse:  # noqa: N802, ANN401
        """Locate over gRPC."""
        return pb.LocateResponse.FromString(await self._ask_once("locate", request, grpc_context))

    async def Describe(self, request: pb.DescribeRequest, grpc_context: Any) -> pb.DescribeResponse:  # noqa: N802, ANN401
        """Describe one of the replicas over gRPC."""
        return pb.DescribeResponse.FromString(await self._ask_once("describe", request, grpc_context))

    async def __call__(self, request: Any) -> Any:  # noqa: ANN401 - Starlette's
        """Answer over HTTP as the server of one machine does, from a replica."""
        path, body = request.url.path, await request.body()
        if not http_relay.is_served(path):
            return _http_failure(NotFoundError(f"no such path in a cluster: {path[:200]}"))
        task, prompt = http_relay.hint_of(path, body)
        if task is None and prompt is not None:
            task = await asyncio.to_thread(self._task_of, prompt)
        messages = self._ask("http", http_relay.carried(request.scope), body, task=task)
        try:
            first = await anext(messages)
        except UnavailableError as error:
            return _http_failure(error)
        return http_relay.Relayed(first, messages, lambda error: error_object(error)[1])

    async def _ask_once(self, method: str, request: Any, grpc_context: Any) -> bytes:  # noqa: ANN401
        try:
            frames = [frame async for frame in self._frames(method, request, grpc_context.invocation_metadata())]
        except FailedCall as failed:
            raise _ended(grpc_context, failed) from None
        return frames[-1]

    async def _frames(self, method: str, request: Any, metadata: Any) -> AsyncIterator[bytes]:  # noqa: ANN401
        """Messages of an answer, in order.

        Raises:
            FailedCall: with what the replica said, or UNAVAILABLE where it could say nothing.
        """
        request_id = new_request_id()
        try:
            request_id = chosen_request_id(request, metadata) or request_id
            task = await self._wanted(request)
            async for frame in self._ask(method, request.SerializeToString(), request_id=request_id, task=task):
                yield _message(frame)
        except GreenroomError as error:
            raise FailedCall(rich_status(error, request_id)) from error

    async def _ask(self, method: str, *asked: Any, task: str | None, **named: Any) -> AsyncIterator[Any]:  # noqa: ANN401
        """What a replica yields.

        Raises:
            UnavailableError: every replica that was tried was lost, or one after its first frame.
        """
        for attempt in range(1, ATTEMPTS + 1):
            begun = False
            frames = getattr(self._replicas, method).remote(*asked, task=task, **named)
            try:
                async for frame in frames:
                    begun = True
                    yield frame
            except Exception as error:
                # Ray tells a dead replica by several classes; what a replica itself cannot do comes as a frame.
                _log.warning("%s: attempt %d: %s", method, attempt, type(error).__name__)
                if begun or attempt == ATTEMPTS:
                    raise UnavailableError("the replica that answered was lost") from error
            else:
                return

    async def _wanted(self, request: Any) -> str | None:  # noqa: ANN401
        """The task that a request will need, as far as that can be said without a model."""
        if not isinstance(request, pb.GenerateRequest | pb.ScoreRequest):
            return None
        route = request.WhichOneof("route")
        if route == "task":
            return str(request.task)
        if (route == "base_only" and request.base_only) or request.WhichOneof("prompt") != "input":
            return None
        return await asyncio.to_thread(self._task_of, request.input)


def _message(frame: bytes) -> bytes:
    if frame[:1] == ERROR:
        raise FailedCall(status_pb2.Status.FromString(frame[1:]))
    return frame[1:]


def _http_failure(error: GreenroomError) -> JSONResponse:
    status, body = error_object(error)
    return JSONResponse(body, status_code=status)


def _ended(grpc_context: Any, failed: FailedCall) -> RuntimeError:  # noqa: ANN401
    """The exception with which Serve's proxy ends a call with this status: code and text arrive, details do not."""
    import grpc
    from google.rpc import error_details_pb2

    codes = {code.value[0]: code for code in grpc.StatusCode}
    info = error_details_pb2.ErrorInfo()
    for detail in failed.status.details:
        detail.Unpack(info)
    grpc_context.set_code(codes[failed.status.code])
    grpc_context.set_details(f"{info.reason}: {failed.status.message}")
    return RuntimeError(failed.status.message)
