"""The layer that asks who calls and whether they may.

It knows nothing of what calls do, only which of them need which scope.
Read first: without configured tokens everybody may infer and nobody may administer.
"""

from __future__ import annotations

from typing import Any

from runtime.errors import PermissionDeniedError
from runtime.service.call import ANONYMOUS, Call, Inner, Principal
from runtime.service.tokens import Tokens

ADMIN_SERVICE = "greenroom.v1.Admin"
ADMIN_CALLS = frozenset({"RepositoryModelLoad", "RepositoryModelUnload"})
"""Calls of other services that administer: they change what is served to everybody."""


class Auth:
    """Lets calls in.

    Args:
        tokens: who is known; None lets everybody infer.
    """

    def __init__(self, tokens: Tokens | None) -> None:
        self._tokens = tokens

    async def __call__(self, call: Call, inner: Inner) -> Any:  # noqa: ANN401 - whatever the call returns
        """Find out who calls and go on.

        Raises:
            UnauthenticatedError, PermissionDeniedError.
        """
        administers = call.method.service == ADMIN_SERVICE or call.method.name in ADMIN_CALLS
        scope = "admin" if administers else "infer"
        call.principal = self.principal(call.metadata.get("authorization"), scope=scope)
        check_tenant(call.principal, getattr(call.message, "tenant", ""))
        return await inner(call)

    def principal(self, authorization: str | None, *, scope: str) -> Principal:
        """Who an `Authorization` header is, if that may do what `scope` names.

        Raises:
            UnauthenticatedError: unknown.
            PermissionDeniedError: known, but without the scope.
        """
        principal = self._tokens.principal(authorization) if self._tokens is not None else ANONYMOUS
        if scope not in principal.scopes:
            raise PermissionDeniedError(f"this call needs a token with the scope {scope}")
        return principal


def check_tenant(principal: Principal, tenant: str) -> None:
    """Refuse a request in the name of another tenant; one without a name is its token's own.

    Raises:
        PermissionDeniedError: it is another's.
    """
    if tenant and principal is not ANONYMOUS and tenant != principal.tenant:
        raise PermissionDeniedError("the token belongs to another tenant than the request names")
