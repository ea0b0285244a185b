"""The HTTP front end of a server: same process, same event loop, same layers, its own port.

It knows nothing of routes.
Read first: it begins after the server has bound its port and ends after it has drained, so what is in flight ends there
and the last bytes leave here. It needs the optional packages of `greenroom[http]`.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import uvicorn

from runtime.errors import InvalidInputError
from runtime.service.http_app import MAX_BODY_BYTES, app_over

if TYPE_CHECKING:
    from runtime.service.guard import Guard
    from runtime.service.server import Server
    from runtime.service.tls import TlsFiles

FLUSH_S = 1.0
MAX_HEADER_BYTES = 64 * 1024


class HttpFront:
    """Serves what `server` serves, over HTTP.

    Args:
        server: whose engine answers; not yet started.
        guard: the server's.
        host: address to bind.
        port: port to bind; 0 takes a free one.
        tls: certificate and key; None serves in the clear.
        max_body_bytes: a longer request is refused.
        max_connections: more are refused with 503.
    """

    def __init__(
        self,
        server: Server,
        guard: Guard,
        *,
        host: str,
        port: int,
        tls: TlsFiles | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
        max_connections: int = 1024,
    ) -> None:
        app = app_over(server.engine, server.models, server.answers, guard, max_body_bytes=max_body_bytes)
        self._scheme = "http" if tls is None else "https"
        self._host = host
        self.port = port
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=max_connections,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                timeout_graceful_shutdown=int(FLUSH_S),
                **_secure(tls),
            )
        )
        self._socket: socket.socket | None = None
        self._serving: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where clients and browsers find it."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{self._scheme}://{host}:{self.port}"

    async def start(self) -> None:
        """Bind and serve; `port` is then the bound one.

        Raises:
            InvalidInputError: the address cannot be bound.
        """
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((self._host, self.port))
        except OSError as error:
            self._socket.close()
            address = f"{self._host}:{self.port}"
            raise InvalidInputError("http.port", address, "cannot be bound; in use, or not ours") from error
        self._socket.listen()  # whoever connects before the first turn of the event loop waits
        self.port = int(self._socket.getsockname()[1])
        self._serving = asyncio.create_task(self._uvicorn.serve(sockets=[self._socket]))

    async def stop(self) -> None:
        """Take no more connections, let last bytes leave, cut the rest; idempotent."""
        if self._serving is not None:
            self._uvicorn.should_exit = True
            await asyncio.wait({self._serving})
        if self._socket is not None:
            self._socket.close()


def _secure(tls: TlsFiles | None) -> dict[str, Any]:
    if tls is None:
        return {}
    files: dict[str, Any] = {"ssl_certfile": tls.certificate, "ssl_keyfile": tls.key}
    if tls.client_ca is None:
        return files
    return {**files, "ssl_ca_certs": tls.client_ca, "ssl_cert_reqs": ssl.CERT_REQUIRED}


class _Uvicorn(uvicorn.Server):
    """Leaves signals to whoever runs the process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
