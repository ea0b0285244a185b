"""What surrounds every call: a request id, an access log line, and exceptions turned into statuses.

It knows nothing of what the calls do; `runtime.service.status` has the table.
Read first: handlers just raise; only here is a call aborted. Calls of gRPC's own services pass untouched.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from runtime.service.request_id import HEADER, REQUEST_ID, chosen_request_id, new_request_id
from runtime.service.status import BUG, DETAILS_KEY, rich_status, rule_for

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Behaviour = Callable[[Any, Any], Awaitable[Any]]

_access_log = logging.getLogger("greenroom.access")
_error_log = logging.getLogger("greenroom.errors")


class CallScope(grpc.aio.ServerInterceptor):
    """Wraps calls with one request message, whose handlers are coroutines (a stream is written to the context)."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:  # noqa: ANN401 - gRPC's handlers are generic over messages
        """Return the handler of the call, wrapped."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or method.startswith("/grpc."):
            return handler
        if handler.unary_stream is not None:
            wrap, behaviour = grpc.unary_stream_rpc_method_handler, handler.unary_stream
        else:
            assert handler.unary_unary is not None, f"{method} streams requests, which this interceptor cannot wrap"
            wrap, behaviour = grpc.unary_unary_rpc_method_handler, handler.unary_unary
        return wrap(_scoped(method, behaviour), handler.request_deserializer, handler.response_serializer)


def _scoped(method: str, behaviour: Behaviour) -> Behaviour:
    async def call(request: Any, context: Any) -> Any:  # noqa: ANN401 - any message, any call
        started_s = time.monotonic()
        request_id = new_request_id()
        code = grpc.StatusCode.OK
        try:
            request_id = chosen_request_id(request, context.invocation_metadata() or ()) or request_id
            REQUEST_ID.set(request_id)
            await context.send_initial_metadata(((HEADER, request_id),))
            return await behaviour(request, context)
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception as error:  # noqa: BLE001 - this is where all of them become statuses
            code = _logged(error, request_id)
            status = rich_status(error, request_id)
            details = ((DETAILS_KEY, status.SerializeToString()),)
            await context.abort(code, status.message, trailing_metadata=details)
        finally:
            _access_log.info(
                "%s %s request_id=%s seconds=%.3f peer=%s",
                method,
                code.name,
                request_id,
                time.monotonic() - started_s,
                context.peer(),
            )

    return call


def _logged(error: Exception, request_id: str) -> grpc.StatusCode:
    """The status code of `error`, after logging what its text on the wire leaves out."""
    rule = rule_for(error)
    if rule is BUG:
        _error_log.error("request_id=%s", request_id, exc_info=error)
    elif rule.text is not None:
        _error_log.warning("request_id=%s %s: %s", request_id, type(error).__name__, error)
    return rule.code
