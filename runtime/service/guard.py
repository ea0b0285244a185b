"""Everything that surrounds the calls of one server: who may call, how often, and who is told of it.

It knows nothing of transports: gRPC calls run through `layers`, other front ends take the parts they need.
Read first: the order of the layers is their meaning; see `layers`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from runtime.service.auth import Auth
from runtime.service.call import Layer
from runtime.service.deadline import deadline
from runtime.service.failures import failures
from runtime.service.identity import Identity
from runtime.service.metrics import Metrics
from runtime.service.observed import Observed
from runtime.service.quota import Quotas
from runtime.service.tokens import Tokens

if TYPE_CHECKING:
    from runtime.service.tracing import Tracing


@dataclass(kw_only=True)
class Guard:
    """What surrounds calls.

    Args:
        auth: who may call.
        quotas: how much.
        metrics: where it is counted.
        tracing: makes spans; None makes none.
    """

    auth: Auth = field(default_factory=lambda: Auth(None))
    quotas: Quotas = field(default_factory=Quotas)
    metrics: Metrics = field(default_factory=Metrics)
    tracing: Tracing | None = None

    @classmethod
    def of(cls, tokens: Tokens | None, *, tracing: Tracing | None = None) -> Guard:
        """A guard with these tokens and the quotas of their tenants."""
        return cls(auth=Auth(tokens), quotas=Quotas(tokens.tenants if tokens else ()), tracing=tracing)

    def layers(self, statuses: Layer = failures) -> tuple[Layer, ...]:
        """The layers of a call, outermost first; `statuses` turns exceptions into the transport's own failures."""
        return (
            Identity(self.tracing),
            Observed(self.metrics),
            statuses,
            self.auth,
            self.quotas,
            deadline,
        )
