"""The layer that turns exceptions into gRPC statuses and logs what their texts on the wire leave out.

It knows nothing of calls beyond their ids; `runtime.service.status` has the table.
Read first: nothing further in aborts a call, and nothing further out sees one of our exceptions.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc

from runtime.service.call import Call, Inner
from runtime.service.status import BUG, DETAILS_KEY, rich_status, rule_for

_error_log = logging.getLogger("greenroom.errors")


async def failures(call: Call, inner: Inner) -> Any:  # noqa: ANN401 - whatever the call returns
    """Run the call; an exception ends it with its status."""
    try:
        return await sound(call, inner)
    except asyncio.CancelledError:
        call.code = grpc.StatusCode.CANCELLED
        raise
    except Exception as error:  # noqa: BLE001 - this is where all of them become statuses
        call.code = logged_code(error, call.request_id)
        status = rich_status(error, call.request_id)
        details = ((DETAILS_KEY, status.SerializeToString()),)
        await call.context.abort(call.code, status.message, trailing_metadata=details)


async def sound(call: Call, inner: Inner) -> Any:  # noqa: ANN401 - whatever the call returns
    """Run the call, unless its headers have a defect, which is raised."""
    if call.defect is not None:
        raise call.defect
    return await inner(call)


def logged_code(error: Exception, request_id: str) -> grpc.StatusCode:
    """The status code of `error`, after logging what its text on the wire leaves out."""
    rule = rule_for(error)
    if rule is BUG:
        _error_log.error("request_id=%s", request_id, exc_info=error)
    elif rule.text is not None:
        _error_log.warning("request_id=%s %s: %s", request_id, type(error).__name__, error)
    return rule.code
