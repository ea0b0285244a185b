"""The layer that counts calls and writes one access line for each.

It knows nothing of what calls do.
Read first: it lies outside the layer of statuses, so every call that came is counted, with the status it ended in.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import grpc

from runtime.service.call import Call, Inner
from runtime.service.metrics import Metrics

_access_log = logging.getLogger("greenroom.access")


class Observed:
    """Counts calls.

    Args:
        metrics: where.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def __call__(self, call: Call, inner: Inner) -> Any:  # noqa: ANN401 - whatever the call returns
        """Run the call and tell of it."""
        self._metrics.call_started(call)
        try:
            return await inner(call)
        except asyncio.CancelledError:
            call.code = grpc.StatusCode.CANCELLED
            raise
        finally:
            seconds = time.monotonic() - call.started_s
            self._metrics.call_ended(call, seconds)
            if _access_log.isEnabledFor(logging.INFO):
                _access_log.info(
                    "%s %s request_id=%s seconds=%.3f peer=%s",
                    call.method,
                    call.code.name,
                    call.request_id,
                    seconds,
                    call.peer,
                    extra={"fields": access_fields(call, seconds)},
                )


def access_fields(call: Call, seconds: float) -> dict[str, object]:
    """What a structured access line says."""
    return {
        "method": str(call.method),
        "code": call.code.name,
        "seconds": round(seconds, 6),
        "peer": call.peer,
        "token": call.principal.name,
        "tenant": call.principal.tenant,
    }
