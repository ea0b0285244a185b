"""The innermost layer: the caller's deadline becomes a point in time, and what is too late is not begun.

It knows nothing of engines, which drop what expires while it waits or runs.
Read first: the point in time is on the clock of `time.monotonic()`.
"""

from __future__ import annotations

import time
from typing import Any

from runtime.errors import DeadlineError
from runtime.service.call import Call, Inner


async def deadline(call: Call, inner: Inner) -> Any:  # noqa: ANN401 - whatever the call returns
    """Fix the deadline and go on.

    Raises:
        DeadlineError: it has passed.
    """
    if call.remaining_s is not None:
        if call.remaining_s <= 0:
            raise DeadlineError("the deadline passed before the request arrived")
        call.deadline = call.started_s + call.remaining_s
        if call.deadline <= time.monotonic():
            raise DeadlineError("the deadline passed before the request could start")
    return await inner(call)
