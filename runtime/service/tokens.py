"""Bearer tokens and tenants, read from a file that holds no secret: tokens stand there as their SHA-256.

It knows nothing of calls; any transport asks it who an `Authorization` header is.
Read first: tokens are random and long (`new_secret`), so a plain SHA-256 cannot be searched. Every entry is compared,
each in constant time, whatever is presented.

    [[tenant]]
    name = "search"
    max_in_flight = 8
    tokens_per_minute = 60000

    [[token]]
    name = "search-frontend"
    sha256 = "..."
    scopes = ["infer"]
    tenant = "search"
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.errors import InvalidInputError, UnauthenticatedError
from runtime.service.call import Principal

Scope = Literal["infer", "admin"]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$")]

MAX_ENTRIES = 1000
MAX_TOKEN_CHARS = 512
_PREFIX = "gr_"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TenantLimits(_Entry):
    """What all tokens of one tenant may use together; None for no limit."""

    name: Name
    max_in_flight: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)


class TokenEntry(_Entry):
    """One token: its name in logs, its digest, what it may do, and for whom; a tenant of its own by default."""

    name: Name
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: Annotated[list[Scope], Field(min_length=1)]
    tenant: Name | None = None


class _File(_Entry):
    tenant: Annotated[list[TenantLimits], Field(max_length=MAX_ENTRIES)] = []
    token: Annotated[list[TokenEntry], Field(min_length=1, max_length=MAX_ENTRIES)]


class Tokens:
    """Who may call.

    Args:
        entries: of all tokens.
        tenants: limits of those that have any.

    Raises:
        InvalidInputError: a name or digest twice.
    """

    def __init__(self, entries: list[TokenEntry], tenants: list[TenantLimits]) -> None:
        for field, values in (
            ("token.name", [entry.name for entry in entries]),
            ("token.sha256", [entry.sha256 for entry in entries]),
            ("tenant.name", [tenant.name for tenant in tenants]),
        ):
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise InvalidInputError(field, twice, "is there twice")
        self.tenants = tuple(tenants)
        self._known = [
            (bytes.fromhex(entry.sha256), Principal(entry.name, entry.tenant or entry.name, frozenset(entry.scopes)))
            for entry in entries
        ]

    @classmethod
    def load(cls, path: Path) -> Tokens:
        """Read a file as shown above.

        Raises:
            InvalidInputError: it cannot be read, or a field of it is unknown, missing or wrong.
        """
        try:
            read = _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InvalidInputError("tokens", str(path), f"cannot be read: {error}") from error
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InvalidInputError("tokens", str(path), f"{where}: {first['msg']}") from error
        return cls(read.token, read.tenant)

    def principal(self, authorization: str | None) -> Principal:
        """Who an `Authorization` header is.

        Raises:
            UnauthenticatedError: it is missing, no bearer token, or unknown.
        """
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not 0 < len(secret) <= MAX_TOKEN_CHARS:
            raise UnauthenticatedError("a bearer token is needed: authorization: Bearer TOKEN")
        digest = hashlib.sha256(secret.encode()).digest()
        found = None
        for known, principal in self._known:
            if hmac.compare_digest(known, digest):
                found = principal
        if found is None:
            raise UnauthenticatedError("the token is not known here")
        return found


def new_secret() -> str:
    """A token of 256 random bits."""
    return _PREFIX + secrets.token_urlsafe(32)


def digest_of(secret: str) -> str:
    """What stands for a token in the file."""
    return hashlib.sha256(secret.encode()).hexdigest()
