"""How a client reaches a server: in the clear or over TLS, with a token and a time limit on every call.

It knows nothing of calls or messages.
Read first: a token sent in the clear can be read on the way; use TLS wherever the network is not your own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

DEFAULT_TIMEOUT_S = 300.0
MAX_MESSAGE_BYTES = 64 * 1024 * 1024

_OPTIONS = (("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),)


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Certificates, as PEM.

    Args:
        roots: that sign the server's certificate; None takes those that gRPC brings.
        certificate: the client's own, where the server asks for one.
        key: private key of it.
        server_name: the name in the server's certificate, where it differs from the address.
    """

    roots: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """What a channel needs."""
        return grpc.ssl_channel_credentials(self.roots, self.key, self.certificate)

    def options(self) -> tuple[tuple[str, str], ...]:
        """What a channel is told."""
        return () if self.server_name is None else (("grpc.ssl_target_name_override", self.server_name),)


def open_channel(target: str, tls: Tls | None) -> grpc.Channel:
    """A channel for threads."""
    if tls is None:
        return grpc.insecure_channel(target, options=_OPTIONS)
    return grpc.secure_channel(target, tls.credentials(), options=(*_OPTIONS, *tls.options()))


def open_aio_channel(target: str, tls: Tls | None) -> grpc.aio.Channel:
    """A channel for asyncio."""
    if tls is None:
        return grpc.aio.insecure_channel(target, options=_OPTIONS)
    return grpc.aio.secure_channel(target, tls.credentials(), options=(*_OPTIONS, *tls.options()))


@dataclass(frozen=True, kw_only=True)
class CallSettings:
    """What every call of one client carries."""

    timeout_s: float
    token: str | None = field(repr=False)

    def arguments(self, timeout_s: float | None) -> dict[str, Any]:
        """Keyword arguments of one call; `timeout_s` overrides the client's own, infinity waits for ever."""
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        metadata = (("authorization", f"Bearer {self.token}"),) if self.token is not None else ()
        return {"timeout": None if math.isinf(limit_s) else limit_s, "metadata": metadata}
