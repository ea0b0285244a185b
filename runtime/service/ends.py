"""What happens beside the answer when a request is decided or has ended: it is counted, charged and traced.

It knows nothing of engines or transports.
Read first: what is to be told is fixed in the task that opens the request, since its end may come after the call's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.engine.request import Failed, Finished, Located
from runtime.service.call import CALL

if TYPE_CHECKING:
    from runtime.service.event_stream import Told
    from runtime.service.guard import Guard


def told(guard: Guard) -> Told:
    """What hears of the events of a request that the current task opens."""
    call = CALL.get(None)
    account = call.account if call is not None else None
    metrics, tracing = guard.metrics, guard.tracing
    parent = tracing.current() if tracing is not None else None

    def tell(event: Located | Finished | Failed) -> None:
        if isinstance(event, Located):
            metrics.located(event)
            return
        metrics.ended(event)
        if account is not None and event.usage is not None:
            account.charge(event.usage.prompt_tokens + event.usage.completion_tokens)
        if tracing is not None and parent is not None:
            tracing.stages(parent, event)

    return tell
