"""The calls of `greenroom.v1.Admin`: what is in memory, what is served, and changing both.

It knows nothing of tokens (`runtime.service.auth` lets only the scope `admin` come here) or of statuses.
Read first: nothing here computes on the event loop; a change answers with how things stand after it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc.aio

from greenroom.pb.greenroom.v1 import admin_pb2 as pb
from greenroom.pb.greenroom.v1 import admin_pb2_grpc
from runtime.errors import ExhaustedError, InvalidInputError, UnavailableError, UnknownTaskError
from runtime.model.names import check_name
from runtime.service.admin_state import changes, status_of, statuses
from runtime.service.auth import ADMIN_SERVICE
from runtime.service.convert import reject_unknown
from runtime.service.server import Service

if TYPE_CHECKING:
    from runtime.engine.engine import Engine
    from runtime.engine.follower import HeadFollower
    from runtime.model.signature import Signer

MAX_WATCHERS = 16
LOOK_S = 0.25


class AdminServicer(admin_pb2_grpc.AdminServicer):
    """Administers one engine.

    Args:
        engine: to be administered.
        follower: publishes generations to it.
        signer: signs the manifests that Rollback makes; None leaves them unsigned.
        look_s: seconds between two looks for what Watch tells.
    """

    def __init__(
        self, engine: Engine, follower: HeadFollower, *, signer: Signer | None = None, look_s: float = LOOK_S
    ) -> None:
        self._engine = engine
        self._follower = follower
        self._signer = signer
        self._look_s = look_s
        self._num_watchers = 0

    def service(self) -> Service:
        """These calls, for a server."""

        def add_to(server: grpc.aio.Server) -> None:
            admin_pb2_grpc.add_AdminServicer_to_server(self, server)  # type: ignore[no-untyped-call]

        return Service(ADMIN_SERVICE, add_to)

    async def ListTasks(self, request: pb.ListTasksRequest, context: Any) -> pb.ListTasksResponse:  # noqa: N802, ANN401, ARG002
        """All tasks of the served generation."""
        reject_unknown(request)
        number, tasks = await asyncio.to_thread(statuses, self._engine)
        return pb.ListTasksResponse(generation=number, tasks=tasks.values())

    async def GetTask(self, request: pb.TaskRequest, context: Any) -> pb.TaskStatus:  # noqa: N802, ANN401, ARG002
        """One of them."""
        return await self._after(request, lambda _task: None)

    async def Prefetch(self, request: pb.TaskRequest, context: Any) -> pb.TaskStatus:  # noqa: N802, ANN401, ARG002
        """Begin to read a task's experts."""
        return await self._after(request, self._engine.prefetch_task)

    async def Pin(self, request: pb.TaskRequest, context: Any) -> pb.TaskStatus:  # noqa: N802, ANN401, ARG002
        """Keep a task's experts in memory."""
        return await self._after(request, self._engine.pin)

    async def Unpin(self, request: pb.TaskRequest, context: Any) -> pb.TaskStatus:  # noqa: N802, ANN401, ARG002
        """Let go of them."""
        return await self._after(request, self._engine.unpin)

    async def Evict(self, request: pb.TaskRequest, context: Any) -> pb.EvictResponse:  # noqa: N802, ANN401, ARG002
        """Drop a task's own experts from memory where nobody holds them."""
        freed: list[int] = []
        task = await self._after(request, lambda name: freed.append(self._engine.evict(name)))
        return pb.EvictResponse(freed_bytes=freed[0], task=task)

    async def Publish(self, request: pb.PublishRequest, context: Any) -> pb.GenerationResponse:  # noqa: N802, ANN401, ARG002
        """Serve the newest generation."""
        reject_unknown(request)
        expected = _number(request, "expected_generation")
        number = _number(request, "generation")
        await asyncio.to_thread(self._follower.publish, expected=expected, number=number)
        return pb.GenerationResponse(generation=number)

    async def Rollback(self, request: pb.RollbackRequest, context: Any) -> pb.GenerationResponse:  # noqa: N802, ANN401, ARG002
        """Serve what an older generation held, as a new one."""
        reject_unknown(request)
        expected = _number(request, "expected_generation")
        to = _number(request, "to_generation")
        number = await asyncio.to_thread(self._follower.rollback, expected=expected, to=to, signer=self._signer)
        return pb.GenerationResponse(generation=number)

    async def Watch(self, request: pb.WatchRequest, context: Any) -> None:  # noqa: N802, ANN401
        """Write how everything stands, then changes, until the caller has had enough.

        Raises:
            ExhaustedError: too many watch already.
            UnavailableError: the server drains.
        """
        reject_unknown(request)
        if self._num_watchers >= MAX_WATCHERS:
            raise ExhaustedError(f"{MAX_WATCHERS} calls watch already")
        self._num_watchers += 1
        try:
            before: tuple[int, dict[str, pb.TaskStatus]] = (0, {})
            while self._engine.accepting:
                now = await asyncio.to_thread(statuses, self._engine)
                for event in changes(before, now):
                    await context.write(event)
                before = now
                await asyncio.sleep(self._look_s)
        finally:
            self._num_watchers -= 1
        raise UnavailableError("the server is draining")

    async def _after(self, request: pb.TaskRequest, change: Callable[[str], None]) -> pb.TaskStatus:
        """How a task stands after a change.

        Raises:
            UnknownTaskError: the served generation has no such task.
        """
        reject_unknown(request)
        name = check_name("task", request.task)
        if name not in self._engine.generation.manifest.task_names():
            raise UnknownTaskError(f"no task {name!r} in generation {self._engine.generation.manifest.generation}")

        def work() -> pb.TaskStatus:
            change(name)
            return status_of(self._engine, name)

        return await asyncio.to_thread(work)


def _number(request: pb.PublishRequest | pb.RollbackRequest, field: str) -> int:
    number = int(getattr(request, field))
    if number < 1:
        raise InvalidInputError(field, number, "a generation's number is at least 1")
    return number
