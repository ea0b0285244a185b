"""The gRPC server: ports, bounds, health, reflection, and the order of starting and draining.

It knows nothing of what its calls do, and never closes the engine, which belongs to whoever made it.
Read first: NEW -> STARTING (bound, health NOT_SERVING) -> READY (SERVING) -> DRAINING -> STOPPED, never back.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from greenroom.pb.greenroom.v1 import greenroom_pb2, greenroom_pb2_grpc
from runtime.errors import InvalidInputError, UnavailableError
from runtime.service.answers import Answers
from runtime.service.ends import told
from runtime.service.guard import Guard
from runtime.service.interceptors import LayeredCalls
from runtime.service.models import DEFAULT_NAME, Models
from runtime.service.oip_servicer import INFERENCE_NAME, InferenceServicer
from runtime.service.servicer import GreenroomServicer
from runtime.service.tls import TlsFiles

if TYPE_CHECKING:
    from runtime.engine.engine import Engine

SERVICE_NAME = greenroom_pb2.DESCRIPTOR.services_by_name["Greenroom"].full_name
MAX_FLUSH_S = 1.0
"""Seconds at the end of the grace time in which last messages leave; then calls are cut."""


class State(enum.Enum):
    """Where a server is in its life."""

    NEW = "new"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Service:
    """A gRPC service to serve beside our own: its full name, and what registers its servicer."""

    name: str
    add_to: Callable[[grpc.aio.Server], None]


class Server:
    """Serves one engine.

    Args:
        engine: is started and drained here; its maker closes it after `stop`.
        host: address to bind.
        port: port to bind; 0 takes a free one.
        grace_s: seconds that running requests get when the server stops.
        max_message_bytes: largest message in either direction.
        max_calls: calls in flight; more are refused with RESOURCE_EXHAUSTED.
        num_submit_threads: requests tokenised at the same time.
        coalesce_s: seconds that tokens may wait for those that follow, see `Answers`.
        tls: certificate and key; None serves in the clear.
        guard: who may call, how much, and who is told; by default everybody, except for administration.
        services: served beside our own; each is told of requests by the same guard.
        name: what clients of foreign protocols call the repertoire.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        host: str,
        port: int,
        grace_s: float,
        max_message_bytes: int = 64 * 1024 * 1024,
        max_calls: int = 1024,
        num_submit_threads: int = 4,
        coalesce_s: float = 0.0,
        tls: TlsFiles | None = None,
        guard: Guard | None = None,
        services: Sequence[Service] = (),
        name: str = DEFAULT_NAME,
    ) -> None:
        self.engine = engine
        self._host = host
        self._port = port
        self._grace_s = grace_s
        self._max_message_bytes = max_message_bytes
        self._max_calls = max_calls
        self._tls = tls
        self._guard = guard or Guard()
        self._services = tuple(services)
        self._names = (SERVICE_NAME, INFERENCE_NAME, *(service.name for service in self._services))
        self.answers = Answers(
            engine, num_threads=num_submit_threads, coalesce_s=coalesce_s, teller=partial(told, self._guard)
        )
        self.models = Models(engine, self.answers, name=name, is_ready=self._is_ready)
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._starting: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self.state = State.NEW

    async def start(self) -> int:
        """Bind, answer health checks with NOT_SERVING, and begin to start the engine; see `wait_ready`.

        Returns:
            The bound port.

        Raises:
            InvalidInputError: the address cannot be bound.
        """
        assert self.state is State.NEW, "a server starts once"
        self._server = grpc.aio.server(
            interceptors=(LayeredCalls(self._guard.layers()),),
            options=self._options(),
            maximum_concurrent_rpcs=self._max_calls,
        )
        servicer = GreenroomServicer(self.engine, self.answers)
        greenroom_pb2_grpc.add_GreenroomServicer_to_server(servicer, self._server)  # type: ignore[no-untyped-call]
        InferenceServicer(self.answers, self.models, self._guard.quotas).add_to(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for service in self._services:
            service.add_to(self._server)
        names = (*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        address = f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"
        credentials = self._tls.credentials() if self._tls is not None else None
        try:
            if credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise InvalidInputError("port", address, "cannot be bound; in use, or not an address of ours") from error
        await self._server.start()
        self.state = State.STARTING
        self._starting = asyncio.create_task(self._start_engine())
        return port

    async def wait_ready(self) -> None:
        """Return once the engine has started and health says SERVING; re-raises what kept it from starting.

        Raises:
            UnavailableError: the server was stopped first.
        """
        assert self._starting is not None, "start() first"
        await asyncio.shield(self._starting)
        if self.state is not State.READY:
            raise UnavailableError("stopped before it was ready")

    async def stop(self) -> None:
        """Refuse new requests, let running ones finish within the grace time, cut the rest; idempotent."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._drain())
        await asyncio.shield(self._stopping)

    async def _start_engine(self) -> None:
        await asyncio.to_thread(self.engine.start)
        if self.state is State.STARTING:
            self.state = State.READY
            await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def _drain(self) -> None:
        started, self.state = self.state, State.DRAINING
        end_s = time.monotonic() + self._grace_s
        flush_s = min(MAX_FLUSH_S, self._grace_s / 4)
        await self._health.enter_graceful_shutdown()
        if self._server is not None and started is not State.NEW:
            assert self._starting is not None
            await asyncio.wait({self._starting})
            if self._starting.exception() is None:
                await asyncio.to_thread(self.engine.drain, max(0.0, end_s - flush_s - time.monotonic()))
            await self._server.stop(flush_s)
        self.answers.close()
        self.state = State.STOPPED

    def _is_ready(self) -> bool:
        return self.state is State.READY

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", *self._names):
            await self._health.set(name, status)

    def _options(self) -> tuple[tuple[str, int], ...]:
        return (
            # Without it, a second server shares a bound port silently.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", self._max_message_bytes),
            ("grpc.max_send_message_length", self._max_message_bytes),
            ("grpc.max_metadata_size", 16 * 1024),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
            ("grpc.http2.max_ping_strikes", 3),
        )
