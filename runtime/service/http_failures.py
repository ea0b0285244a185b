"""The layer that turns exceptions into HTTP statuses with the error objects that OpenAI's clients read.

It knows nothing of what failed; `runtime.service.status` decides what a client may be told.
Read first: once a stream of events has begun, its last event is the error object, and no `[DONE]` follows.
"""

from __future__ import annotations

import asyncio
import json
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import grpc

from runtime.errors import GreenroomError, InvalidInputError
from runtime.service.failures import logged_code, sound
from runtime.service.request_id import HEADER
from runtime.service.status import MAX_TEXT, retry_after, rule_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from runtime.service.call import Call, Inner
    from runtime.service.http_exchange import Exchange

INTERNAL_STATUS = 500
STATUSES: Mapping[grpc.StatusCode, tuple[int, str]] = MappingProxyType(
    {
        grpc.StatusCode.INVALID_ARGUMENT: (400, "invalid_request_error"),
        grpc.StatusCode.UNAUTHENTICATED: (401, "authentication_error"),
        grpc.StatusCode.PERMISSION_DENIED: (403, "permission_error"),
        grpc.StatusCode.NOT_FOUND: (404, "not_found_error"),
        grpc.StatusCode.ABORTED: (409, "conflict_error"),
        grpc.StatusCode.FAILED_PRECONDITION: (422, "unprocessable_error"),
        grpc.StatusCode.RESOURCE_EXHAUSTED: (429, "rate_limit_error"),
        grpc.StatusCode.CANCELLED: (499, "cancelled_error"),
        grpc.StatusCode.INTERNAL: (INTERNAL_STATUS, "server_error"),
        grpc.StatusCode.UNAVAILABLE: (503, "unavailable_error"),
        grpc.StatusCode.DEADLINE_EXCEEDED: (504, "timeout_error"),
    }
)
"""HTTP status, and the `type` of the error object."""


class HttpFailures:
    """Ends one exchange, whatever happens.

    Args:
        exchange: where the error goes.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    async def __call__(self, call: Call, inner: Inner) -> Any:  # noqa: ANN401 - whatever the call returns
        """Run the call; an exception becomes the response, or its last event."""
        self._exchange.response_headers[HEADER] = call.request_id
        try:
            return await sound(call, inner)
        except asyncio.CancelledError:
            call.code = grpc.StatusCode.CANCELLED
            raise
        except Exception as error:  # noqa: BLE001 - this is where all of them become statuses
            call.code = logged_code(error, call.request_id)
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        status, body = error_object(error)
        if self._exchange.begun:
            self._exchange.last_event(json.dumps(body))
            return
        delay_s = retry_after(error)
        if delay_s is not None:
            self._exchange.response_headers["retry-after"] = str(max(1, round(delay_s)))
        self._exchange.reply_json(body, status=status)


def error_object(error: Exception) -> tuple[int, dict[str, Any]]:
    """The HTTP status of an exception and `{"error": {"message", "type", "param", "code"}}`."""
    rule = rule_for(error)
    status, kind = STATUSES[rule.code]
    ours = isinstance(error, GreenroomError) and status != INTERNAL_STATUS
    return status, {
        "error": {
            "message": (rule.text or str(error))[:MAX_TEXT],
            "type": kind,
            "param": error.field if isinstance(error, InvalidInputError) else None,
            "code": error.reason if ours else GreenroomError.reason,  # type: ignore[attr-defined]
        }
    }
