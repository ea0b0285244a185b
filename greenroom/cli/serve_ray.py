"""`greenroom serve --ray`: replicas on a Ray cluster behind one entry, until a signal comes.

It knows nothing of how requests are routed (`runtime.scale`).
Read first: the port belongs to Ray Serve's proxy, so what `greenroom serve` does around its own port (TLS, tokens,
administration, metrics, traces, log lines) cannot be had with it, and is refused. A cluster of our own ends with the
command; on another one the application is removed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import typer

from greenroom.cli.serve_config import DEFAULTS, ServeConfig
from greenroom.cli.task_hint import TaskHint
from runtime.errors import InvalidInputError
from runtime.scale.cluster import LOCAL, connected
from runtime.scale.serve_app import APPLICATION, ClusterOptions, run_application

if TYPE_CHECKING:
    from greenroom.cli.engine_flags import EngineFlags
    from runtime.engine.engine import Engine
    from runtime.engine.follower import HeadFollower

_NEVER_S = 10.0**9
_REFUSED = {
    "server": ("host", "name", "grace", "max_message", "max_calls", "coalesce", "tokens", "admin", "signing_key"),
    "tls": ("certificate", "key", "client_ca"),
    "metrics": ("host", "port"),
    "log": ("format", "level"),
    "traces": ("endpoint",),
}


def serve_on_ray(chosen: ServeConfig) -> None:
    """Serve what the configuration says until SIGTERM or SIGINT.

    Raises:
        InvalidInputError: a setting that cannot be had on Ray Serve, or Ray is not installed.
        UnavailableError: there is no cluster at the address.
    """
    check_settings(chosen)
    flags, ray_settings = chosen.engine_flags(), chosen.ray
    num_cpus = max(1, flags.threads)
    options = ClusterOptions(
        replicas=ray_settings.replicas,
        autoscaling=ray_settings.autoscaling(),
        num_cpus=num_cpus,
        num_gpus=ray_settings.gpus,
        grpc_port=chosen.server.port,
        http_host=chosen.http.host,
        http_port=chosen.http.port or ClusterOptions().http_port,
    )
    most = ray_settings.max_replicas or ray_settings.replicas
    with connected(ray_settings.address, num_cpus=most * num_cpus), signalled() as ending:  # Ray sets handlers, too
        from ray import serve

        try:
            run_application(
                partial(_build, flags),
                partial(_follow, flags, chosen.server.follow or None),
                partial(TaskHint, flags.repertoire),
                options,
            )
            typer.echo(f"serving on port {options.grpc_port}, http on {options.http_host}:{options.http_port}")
            if chosen.server.ready_file is not None:
                from greenroom.cli.serve import write_atomically

                write_atomically(chosen.server.ready_file, f"{options.grpc_port}\n")
            ending.wait()
        finally:
            serve.delete(APPLICATION)
            if ray_settings.address == LOCAL:
                serve.shutdown()


def check_settings(chosen: ServeConfig) -> None:
    """Refuse what Ray Serve's port does not do.

    Raises:
        InvalidInputError: naming the first such setting.
    """
    for section, keys in _REFUSED.items():
        for key in keys:
            value = getattr(getattr(chosen, section), key)
            if value != getattr(getattr(DEFAULTS, section), key):
                raise InvalidInputError(f"{section}.{key}", value, "cannot be had with --ray: Ray Serve has the port")
    if not chosen.server.port:
        raise InvalidInputError("server.port", chosen.server.port, "with --ray it must be chosen")


def _build(flags: EngineFlags) -> Engine:
    from greenroom.cli.build_engine import build_engine

    return build_engine(flags)


def _follow(flags: EngineFlags, interval_s: float | None, engine: Engine) -> HeadFollower:
    from greenroom.cli.build_engine import open_repertoire
    from runtime.engine.follower import HeadFollower

    return HeadFollower(open_repertoire(flags), engine, interval_s=interval_s or _NEVER_S)


@contextmanager
def signalled() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, from the first replica's start to the removal of the last."""
    ending = threading.Event()
    before = {number: signal.signal(number, lambda *_: ending.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield ending
    finally:
        for number, old in before.items():
            signal.signal(number, old)
