"""The outermost layer: a call gets its request id, takes up the caller's trace, and becomes the current one.

It knows nothing of spans: `runtime.service.tracing` makes them where it is configured.
Read first: a request id that cannot be used does not fail here, where nobody answers yet, but in the layer of statuses.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from runtime.errors import InvalidInputError
from runtime.service.call import CALL, Call, Inner
from runtime.service.request_id import HEADER, REQUEST_ID, chosen_request_id, new_request_id

if TYPE_CHECKING:
    from runtime.service.tracing import Tracing

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


class Identity:
    """Names calls.

    Args:
        tracing: makes a span of every call; None makes none.
    """

    def __init__(self, tracing: Tracing | None) -> None:
        self._tracing = tracing

    async def __call__(self, call: Call, inner: Inner) -> Any:  # noqa: ANN401 - whatever the call returns
        """Name the call, tell the caller its name, and go on."""
        call.request_id = new_request_id()
        try:
            call.request_id = chosen_request_id(call.message, call.metadata.items()) or call.request_id
        except InvalidInputError as error:
            call.defect = error
        call.trace_id = trace_id_of(call.metadata.get("traceparent", ""))
        CALL.set(call)
        REQUEST_ID.set(call.request_id)
        if call.context is not None:
            await call.context.send_initial_metadata(((HEADER, call.request_id),))
        span: AbstractContextManager[None] = self._tracing.span(call) if self._tracing else nullcontext()
        with span:
            return await inner(call)


def trace_id_of(traceparent: str) -> str:
    """The trace id of a W3C `traceparent` header; empty where it is none."""
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None or traceparent.startswith("ff") or (traceparent.startswith("00") and match[2]):
        return ""
    return match[1] if match[1].strip("0") else ""
