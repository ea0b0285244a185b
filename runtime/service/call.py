"""One call on its way through the layers around the service, whatever transport brought it.

It knows nothing of engines or messages.
Read first: the outermost layers fill a `Call` in, the inner ones and the service read it; `CALL` is the current one.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import grpc

from runtime.errors import InvalidInputError

Kind = Literal["unary", "server_stream", "client_stream", "bidi_stream"]


class Account(Protocol):
    """Where the tokens of a call are charged."""

    def charge(self, num_tokens: int) -> None:
        """Take so many tokens from what is left."""


@dataclass(frozen=True)
class Principal:
    """Who calls.

    Args:
        name: of the token.
        tenant: whose quota it uses.
        scopes: what it may do: "infer", "admin".
    """

    name: str
    tenant: str
    scopes: frozenset[str]


ANONYMOUS = Principal(name="", tenant="", scopes=frozenset({"infer"}))
"""Everybody, where no tokens are configured: never an administrator."""


@dataclass(frozen=True)
class Method:
    """What is called: `service` and `name` as in "/service/name", and how many messages go which way."""

    service: str
    name: str
    kind: Kind

    def __str__(self) -> str:
        return f"/{self.service}/{self.name}"


@dataclass(kw_only=True, slots=True)
class Call:
    """One call.

    Args:
        method: what is called.
        message: the request, None where requests are streamed.
        metadata: headers, names in lower case.
        peer: where it comes from, as the transport says it.
        remaining_s: seconds until the caller's deadline; None for none.
        context: gRPC's context; None on other transports.
        started_s: on the clock of `time.monotonic()`.

    Filled in by the layers: `request_id`, `trace_id`, `defect` (of the headers, raised further in), `principal`,
    `account`, `deadline` (absolute, on the clock of `time.monotonic()`), `code`.
    """

    method: Method
    message: Any
    metadata: Mapping[str, str]
    peer: str
    remaining_s: float | None
    context: Any = None
    started_s: float = field(default_factory=time.monotonic)
    request_id: str = ""
    trace_id: str = ""
    defect: InvalidInputError | None = None
    principal: Principal = ANONYMOUS
    account: Account | None = None
    deadline: float | None = None
    code: grpc.StatusCode = grpc.StatusCode.OK


Inner = Callable[[Call], Awaitable[Any]]
Layer = Callable[[Call, Inner], Awaitable[Any]]
"""What surrounds a call: does something, awaits `inner(call)` once at most, and returns its result."""

CALL: ContextVar[Call] = ContextVar("greenroom_call")
"""The call that the current task serves."""


def surround(inner: Inner, layers: tuple[Layer, ...]) -> Inner:
    """`inner` within the layers, the first outermost."""
    for layer in reversed(layers):
        inner = _within(layer, inner)
    return inner


def _within(layer: Layer, inner: Inner) -> Inner:
    def surrounded(call: Call) -> Awaitable[Any]:
        return layer(call, inner)

    return surrounded
