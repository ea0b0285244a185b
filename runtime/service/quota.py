"""The layer that keeps tenants within their quotas: requests in flight, and tokens per minute.

It knows nothing of how tokens come about; what a request used is charged when it has ended, prompt included.
Read first: a tenant's minute is a bucket that fills steadily. A request may begin while anything is in it, and may take
more than is left; then the tenant waits until the debt is paid. Used on the event loop only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from runtime.errors import QuotaError
from runtime.service.call import Account, Call, Inner, Principal
from runtime.service.status import RETRY_AFTER_S
from runtime.service.tokens import TenantLimits


class TenantAccount:
    """What one tenant uses.

    Args:
        limits: of the tenant.
        clock: seconds, monotonic.
    """

    def __init__(self, limits: TenantLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._left = float(limits.tokens_per_minute or 0)
        self._seen_s = clock()
        self.in_flight = 0

    def charge(self, num_tokens: int) -> None:
        """Take tokens from what is left; it may become a debt."""
        self._refill()
        self._left -= num_tokens

    @contextmanager
    def enter(self) -> Iterator[None]:
        """One request in flight for the time of the block.

        Raises:
            QuotaError: none may begin now.
        """
        limits = self._limits
        if limits.max_in_flight is not None and self.in_flight >= limits.max_in_flight:
            raise QuotaError(f"{self.in_flight} requests are in flight for this tenant", retry_after_s=RETRY_AFTER_S)
        self._refill()
        if limits.tokens_per_minute is not None and self._left <= 0:
            wait_s = (1 - self._left) * 60 / limits.tokens_per_minute
            raise QuotaError("this tenant has used its tokens of the minute", retry_after_s=wait_s)
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def _refill(self) -> None:
        now_s, per_minute = self._clock(), float(self._limits.tokens_per_minute or 0)
        self._left = min(per_minute, self._left + (now_s - self._seen_s) * per_minute / 60)
        self._seen_s = now_s


class Quotas:
    """The accounts of all tenants that have limits; the others are not counted.

    Args:
        tenants: their limits.
        clock: seconds, monotonic.
    """

    def __init__(self, tenants: Iterable[TenantLimits] = (), *, clock: Callable[[], float] = time.monotonic) -> None:
        self._accounts = {limits.name: TenantAccount(limits, clock) for limits in tenants}

    async def __call__(self, call: Call, inner: Inner) -> Any:  # noqa: ANN401 - whatever the call returns
        """Count the call for its tenant and go on; a call that streams requests counts each of them itself.

        Raises:
            QuotaError.
        """
        if call.method.kind in {"client_stream", "bidi_stream"}:
            return await inner(call)
        with self.enter(call.principal) as call.account:
            return await inner(call)

    @contextmanager
    def enter(self, principal: Principal) -> Iterator[Account | None]:
        """One request of a principal in flight; yields where its tokens are to be charged, None for nowhere.

        Raises:
            QuotaError.
        """
        account = self._accounts.get(principal.tenant)
        if account is None:
            yield None
            return
        with account.enter():
            yield account
