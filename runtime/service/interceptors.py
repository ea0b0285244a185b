"""gRPC's end of the layers: every call of our services becomes a `Call` and runs through them.

It knows nothing of what the layers or the calls do.
Read first: handlers are coroutines that write to the context, or asynchronous generators; they just raise, and a layer
turns that into a status. Calls of gRPC's own services (health, reflection) pass untouched.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from runtime.service.call import Call, Inner, Kind, Layer, Method, surround

if TYPE_CHECKING:
    Behaviour = Callable[[Any, Any], Any]

_KINDS: dict[tuple[bool, bool], tuple[Kind, str, Any]] = {
    (False, False): ("unary", "unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("server_stream", "unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("client_stream", "stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("bidi_stream", "stream_stream", grpc.stream_stream_rpc_method_handler),
}


class LayeredCalls(grpc.aio.ServerInterceptor):
    """Runs calls through layers.

    Args:
        layers: the first outermost.
    """

    def __init__(self, layers: tuple[Layer, ...]) -> None:
        self._layers = layers

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:  # noqa: ANN401 - gRPC's handlers are generic over messages
        """Return the handler of the call, surrounded."""
        handler = await continuation(handler_call_details)
        path = str(handler_call_details.method)
        if handler is None or path.startswith("/grpc."):
            return handler
        kind, attribute, make = _KINDS[handler.request_streaming, handler.response_streaming]
        service, _, name = path.removeprefix("/").partition("/")
        behaviour = self._surrounded(Method(service, name, kind), getattr(handler, attribute))
        return make(behaviour, handler.request_deserializer, handler.response_serializer)

    def _surrounded(self, method: Method, behaviour: Behaviour) -> Callable[[Any, Any], Awaitable[Any]]:
        streams_requests = method.kind in {"client_stream", "bidi_stream"}

        async def answer(request: Any, context: Any) -> Any:  # noqa: ANN401 - any message, any call
            call = Call(
                method=method,
                message=None if streams_requests else request,
                metadata=_text_headers(context.invocation_metadata() or ()),
                peer=context.peer(),
                remaining_s=context.time_remaining(),
                context=context,
            )
            return await surround(_innermost(behaviour, request), self._layers)(call)

        return answer


def _innermost(behaviour: Behaviour, request: Any) -> Inner:  # noqa: ANN401 - any message
    async def answer(call: Call) -> Any:  # noqa: ANN401 - any message
        if not inspect.isasyncgenfunction(behaviour):
            return await behaviour(request, call.context)
        async for message in behaviour(request, call.context):
            await call.context.write(message)
        return None

    return answer


def _text_headers(metadata: Any) -> dict[str, str]:  # noqa: ANN401 - pairs of a name and a text or bytes
    """Headers with text values; of those given twice the first."""
    headers: dict[str, str] = {}
    for name, value in metadata:
        if isinstance(value, str):
            headers.setdefault(name, value)
    return headers
