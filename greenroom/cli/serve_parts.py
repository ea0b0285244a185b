"""What goes with a server: its guard, its logs, its traces and the port of its metrics, as a configuration says.

It does not know what is served.
Read first: each part is off unless it is configured, except for logs on stderr.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from greenroom.cli.engine_flags import parse_size
from greenroom.cli.serve_config import LogSection, MetricsSection, ServeConfig, ServerSection, TlsSection, TracesSection
from runtime.errors import InvalidInputError
from runtime.model.signature import Signer
from runtime.service.admin_servicer import AdminServicer
from runtime.service.guard import Guard
from runtime.service.logs import JsonLines
from runtime.service.metrics import Metrics
from runtime.service.metrics_port import metrics_port
from runtime.service.server import Server, Service
from runtime.service.tls import TlsFiles
from runtime.service.tokens import Tokens

if TYPE_CHECKING:
    from runtime.engine.engine import Engine
    from runtime.engine.follower import HeadFollower
    from runtime.service.http_front import HttpFront
    from runtime.service.tracing import Tracing


def make_server(
    chosen: ServeConfig, engine: Engine, follower: HeadFollower, tracing: Tracing | None
) -> tuple[Server, Guard]:
    """A server that is not started yet, and what guards its calls.

    Raises:
        InvalidInputError: a file that is named cannot be used, or parts do not fit together.
    """
    section = chosen.server
    tokens = Tokens.load(section.tokens) if section.tokens is not None else None
    guard = Guard.of(tokens, tracing=tracing)
    guard.metrics.watch_engine(engine.statistics)
    server = Server(
        engine,
        host=section.host,
        port=section.port,
        grace_s=section.grace,
        max_message_bytes=parse_size("max_message", section.max_message),
        max_calls=section.max_calls,
        coalesce_s=section.coalesce,
        tls=tls_files(chosen.tls),
        guard=guard,
        services=admin_services(chosen.server, engine, follower),
        name=section.name,
    )
    return server, guard


def make_front(chosen: ServeConfig, server: Server, guard: Guard) -> HttpFront | None:
    """The same over HTTP, not started yet; None where no port is named.

    Raises:
        InvalidInputError: the extra `http` is not installed, or parts do not fit together.
    """
    if chosen.http.port is None:
        return None
    try:
        from runtime.service.http_front import HttpFront
    except ImportError as error:
        raise InvalidInputError("http.port", chosen.http.port, "pip install greenroom[http]") from error
    return HttpFront(
        server,
        guard,
        host=chosen.http.host,
        port=chosen.http.port,
        tls=tls_files(chosen.tls),
        max_connections=chosen.server.max_calls,
    )


def admin_services(section: ServerSection, engine: Engine, follower: HeadFollower) -> tuple[Service, ...]:
    """The admin service, where it is configured.

    Raises:
        InvalidInputError: without tokens nobody could reach it; or its key cannot be read.
    """
    if not section.admin:
        if section.signing_key is not None:
            raise InvalidInputError("server.signing_key", str(section.signing_key), "is for administration alone")
        return ()
    if section.tokens is None:
        raise InvalidInputError("server.admin", section.admin, "needs tokens, one of them with the scope admin")
    signer = Signer.load(section.signing_key) if section.signing_key is not None else None
    return (AdminServicer(engine, follower, signer=signer).service(),)


def tls_files(section: TlsSection) -> TlsFiles | None:
    """The files of a section; None where it names none.

    Raises:
        InvalidInputError: it names some and lacks others.
    """
    if section.certificate is None and section.key is None and section.client_ca is None:
        return None
    for field in ("certificate", "key"):
        if getattr(section, field) is None:
            raise InvalidInputError(f"tls.{field}", None, "TLS needs a certificate and its key")
    assert section.certificate is not None
    assert section.key is not None
    return TlsFiles(certificate=section.certificate, key=section.key, client_ca=section.client_ca)


def logging_as(section: LogSection) -> None:
    """Log to stderr as the section says."""
    logging.basicConfig(
        level=section.level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s", force=True
    )
    if section.format == "json":
        for output in logging.getLogger().handlers:
            output.setFormatter(JsonLines())


@contextmanager
def tracing_as(section: TracesSection) -> Iterator[Tracing | None]:
    """Tracing to the endpoint of the section; None where it names none.

    Raises:
        InvalidInputError: the extra `otel` is not installed.
    """
    if section.endpoint is None:
        yield None
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        from runtime.service.tracing import exporting
    except ImportError as error:
        raise InvalidInputError("traces.endpoint", section.endpoint, "pip install greenroom[otel]") from error
    insecure = not section.endpoint.startswith("https://")
    with exporting(OTLPSpanExporter(endpoint=section.endpoint, insecure=insecure)) as tracing:
        yield tracing


@contextmanager
def serving_metrics(section: MetricsSection, metrics: Metrics) -> Iterator[None]:
    """Metrics on the port of the section for the time of the block; nothing where it names none."""
    if section.port is None:
        yield
        return
    with metrics_port(metrics, host=section.host, port=section.port) as port:
        typer.echo(f"metrics on http://{section.host}:{port}/metrics")
        yield
