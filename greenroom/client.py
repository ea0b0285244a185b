"""The client: `Client` for threads, `AsyncClient` for asyncio; the same calls, options and results.

It knows nothing of protobuf fields (`greenroom.wire`) or status details (`greenroom.client_errors`).
Read first: nothing is sent before the first event of a stream is asked for, and closing a stream early cancels it.

    with Client("localhost:50051") as client:
        answer = client.generate("where is my parcel?")
        print(answer.routing.task, answer.text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from greenroom import wire
from greenroom.channel import DEFAULT_TIMEOUT_S, CallSettings, Tls, open_aio_channel, open_channel
from greenroom.client_errors import DeadlineExceededError, NotFoundError, UnavailableError, translated
from greenroom.pb.greenroom.v1 import greenroom_pb2 as pb
from greenroom.pb.greenroom.v1 import greenroom_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator
    from typing import Self, Unpack

    from greenroom.options import GenerateOptions, LocateOptions, Prompt, RouteOptions
    from greenroom.results import Answer, Description, Routing, Score, StreamEvent

HEALTH_TIMEOUT_S = 5.0
SERVICE_NAME = "greenroom.v1.Greenroom"

_HEALTH_REQUEST = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
_NOT_SERVING = (UnavailableError, DeadlineExceededError, NotFoundError)


def _is_serving(response: health_pb2.HealthCheckResponse) -> bool:
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


class Client:
    """Blocking client; safe to share between threads; a context manager.

    Args:
        target: "host:port" of a server.
        timeout_s: seconds for each call, unless the call says otherwise; infinity waits for ever.
        token: bearer token, sent with every call.
        tls: talk over TLS with these certificates; None talks in the clear.
    """

    def __init__(
        self, target: str, *, timeout_s: float = DEFAULT_TIMEOUT_S, token: str | None = None, tls: Tls | None = None
    ) -> None:
        self._settings = CallSettings(timeout_s=timeout_s, token=token)
        self._channel = open_channel(target, tls)
        self._stub: Any = greenroom_pb2_grpc.GreenroomStub(self._channel)  # type: ignore[no-untyped-call]
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def generate(
        self, prompt: Prompt, /, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Answer:
        """The whole answer to one prompt.

        Args:
            prompt: the input, or the whole prompt with `raw=True`, or a chat; see `greenroom.options.Prompt`.
            timeout_s: seconds for this call; None takes the client's.
            **options: see `greenroom.options.GenerateOptions`.

        Raises:
            GreenroomClientError: one class per gRPC status, see `greenroom.client_errors`.
        """
        return wire.answer(self.stream(prompt, timeout_s=timeout_s, **options))

    def stream(
        self, prompt: Prompt, /, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generator[StreamEvent, None, None]:
        """The answer as it comes: one `Routing`, then `Delta`s, then one `Done`; arguments as for `generate`.

        Closing the iterator early (`contextlib.closing`, or dropping it) cancels the request on the server.
        """
        request = wire.generate_request(prompt, options)
        with translated():
            call = self._stub.Generate(request, **self._settings.arguments(timeout_s))
            try:
                for message in call:
                    yield wire.event(message)
            finally:
                call.cancel()

    def score(
        self,
        prompt: Prompt,
        continuation: str,
        /,
        *,
        timeout_s: float | None = None,
        **options: Unpack[RouteOptions],
    ) -> Score:
        """How likely the answer `continuation` is; generates nothing."""
        request = wire.score_request(prompt, continuation, options)
        with translated():
            return wire.score(self._stub.Score(request, **self._settings.arguments(timeout_s)))

    def locate(self, prompt: Prompt, /, *, timeout_s: float | None = None, **options: Unpack[LocateOptions]) -> Routing:
        """Which task would answer `prompt`; loads no expert and generates nothing."""
        request = wire.locate_request(prompt, options)
        with translated():
            return wire.routing(self._stub.Locate(request, **self._settings.arguments(timeout_s)).routing)

    def describe(self, *, timeout_s: float | None = None) -> Description:
        """What the server serves and how it is doing."""
        with translated():
            return wire.description(self._stub.Describe(pb.DescribeRequest(), **self._settings.arguments(timeout_s)))

    def health(self, *, timeout_s: float = HEALTH_TIMEOUT_S) -> bool:
        """Whether the server takes requests now; False as well where it cannot be reached in `timeout_s` seconds."""
        try:
            with translated():
                return _is_serving(self._health.Check(_HEALTH_REQUEST, **self._settings.arguments(timeout_s)))
        except _NOT_SERVING:
            return False

    def close(self) -> None:
        """Close the connection; calls in flight are cancelled; idempotent."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """The same client for asyncio; make it inside a running loop; an async context manager; arguments as `Client`."""

    def __init__(
        self, target: str, *, timeout_s: float = DEFAULT_TIMEOUT_S, token: str | None = None, tls: Tls | None = None
    ) -> None:
        self._settings = CallSettings(timeout_s=timeout_s, token=token)
        self._channel = open_aio_channel(target, tls)
        self._stub: Any = greenroom_pb2_grpc.GreenroomStub(self._channel)  # type: ignore[no-untyped-call]
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    async def generate(
        self, prompt: Prompt, /, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Answer:
        """As `Client.generate`."""
        return wire.answer([item async for item in self.stream(prompt, timeout_s=timeout_s, **options)])

    async def stream(
        self, prompt: Prompt, /, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[StreamEvent, None]:
        """As `Client.stream`; close it early with `contextlib.aclosing`."""
        request = wire.generate_request(prompt, options)
        with translated():
            call = self._stub.Generate(request, **self._settings.arguments(timeout_s))
            try:
                async for message in call:
                    yield wire.event(message)
            finally:
                call.cancel()

    async def score(
        self,
        prompt: Prompt,
        continuation: str,
        /,
        *,
        timeout_s: float | None = None,
        **options: Unpack[RouteOptions],
    ) -> Score:
        """As `Client.score`."""
        request = wire.score_request(prompt, continuation, options)
        with translated():
            return wire.score(await self._stub.Score(request, **self._settings.arguments(timeout_s)))

    async def locate(
        self, prompt: Prompt, /, *, timeout_s: float | None = None, **options: Unpack[LocateOptions]
    ) -> Routing:
        """As `Client.locate`."""
        request = wire.locate_request(prompt, options)
        with translated():
            return wire.routing((await self._stub.Locate(request, **self._settings.arguments(timeout_s))).routing)

    async def describe(self, *, timeout_s: float | None = None) -> Description:
        """As `Client.describe`."""
        with translated():
            message = await self._stub.Describe(pb.DescribeRequest(), **self._settings.arguments(timeout_s))
        return wire.description(message)

    async def health(self, *, timeout_s: float = HEALTH_TIMEOUT_S) -> bool:
        """As `Client.health`."""
        try:
            with translated():
                return _is_serving(await self._health.Check(_HEALTH_REQUEST, **self._settings.arguments(timeout_s)))
        except _NOT_SERVING:
            return False

    async def close(self) -> None:
        """As `Client.close`."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
