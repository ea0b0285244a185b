"""`greenroom serve`: an engine behind gRPC until a signal comes.

It knows nothing of how an engine is built or a server drains, nor of what goes with a server (`serve_parts`).
Read first: it prints "serving on HOST:PORT" when requests are taken, and writes the port to `--ready-file` then.
Everything can stand in a file instead (`--config`); the flags given override it.
"""

import asyncio
import gc
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from greenroom.cli import engine_flags as flags
from greenroom.cli.serve_config import DEFAULTS, ServeConfig, as_toml, load_config

_SERVER = DEFAULTS.server


def serve(
    context: typer.Context,
    *,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of these; flags override it.")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print what would be used, and end.")] = False,
    repertoire: Annotated[Path | None, typer.Option(help="Folder of the repertoire.")] = None,
    trust: flags.TrustFlag = None,
    base: flags.BaseFlag = None,
    host: Annotated[str, typer.Option(help="Address to bind.")] = _SERVER.host,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to bind; 0 takes a free one.")] = _SERVER.port,
    name: Annotated[
        str, typer.Option(help="What OpenAI and Triton clients call the repertoire: model NAME or NAME:TASK.")
    ] = _SERVER.name,
    expert_memory: flags.ExpertMemoryFlag = flags.DEFAULT_EXPERT_MEMORY,
    device_memory: flags.DeviceMemoryFlag = flags.DEFAULT_DEVICE_MEMORY,
    tenant_floors: flags.TenantFloorsFlag = flags.DEFAULT_TENANT_FLOORS,
    max_rank: flags.MaxRankFlag = flags.LIMITS.max_rank,
    loaders: flags.LoadersFlag = flags.LIMITS.num_loaders,
    kv_memory: flags.KvMemoryFlag = flags.DEFAULT_KV_MEMORY,
    prefix_memory: flags.PrefixMemoryFlag = flags.DEFAULT_PREFIX_MEMORY,
    max_running: flags.MaxRunningFlag = flags.LIMITS.max_running,
    policy: flags.PolicyFlag = flags.LIMITS.policy,
    eviction: flags.EvictionFlag = flags.LIMITS.eviction,
    prefetch: flags.PrefetchFlag = flags.LIMITS.prefetch,
    max_draft: flags.DraftFlag = flags.LIMITS.max_draft,
    dtype: flags.DtypeFlag = flags.DEFAULT_DTYPE,
    step: flags.StepFlag = flags.DEFAULT_STEP,
    device: flags.DeviceFlag = flags.DEFAULT_DEVICE,
    cuda_graphs: flags.GraphsFlag = flags.DEFAULT_GRAPHS,
    threads: flags.ThreadsFlag = flags.DEFAULT_THREADS,
    grace: Annotated[
        float, typer.Option(min=0.0, max=3600.0, help="Seconds running requests get at the end.")
    ] = _SERVER.grace,
    follow: Annotated[
        float, typer.Option(min=0.0, help="Seconds between looks for a new generation; 0 never looks.")
    ] = _SERVER.follow,
    ready_file: Annotated[Path | None, typer.Option(help="File to write the port to when ready.")] = None,
    max_message: Annotated[str, typer.Option(help="Largest message, as in 64MiB.")] = _SERVER.max_message,
    max_calls: Annotated[int, typer.Option(min=1, help="Calls in flight at most.")] = _SERVER.max_calls,
    coalesce: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Seconds that tokens may wait to be sent together; not the first.")
    ] = _SERVER.coalesce,
    tokens: Annotated[Path | None, typer.Option(help="File of bearer tokens; see `greenroom token`.")] = None,
    admin: Annotated[bool, typer.Option("--admin/--no-admin", help="Serve administration; needs tokens.")] = (
        _SERVER.admin
    ),
    signing_key: Annotated[Path | None, typer.Option(help="Private key (ed25519, PEM) for rollbacks.")] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM: the server's certificate chain.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM: its private key.")] = None,
    tls_client_ca: Annotated[Path | None, typer.Option(help="PEM: who signs clients; asks for certificates.")] = None,
    http_host: Annotated[str, typer.Option(help="Address of the HTTP front end.")] = DEFAULTS.http.host,
    http_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port for OpenAI's clients and the page; without it, none.")
    ] = None,
    metrics_host: Annotated[str, typer.Option(help="Address of /metrics.")] = DEFAULTS.metrics.host,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port of /metrics; without it there is none.")
    ] = None,
    log_format: Annotated[Literal["text", "json"], typer.Option(help="How log lines look.")] = DEFAULTS.log.format,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="How much is logged.")
    ] = DEFAULTS.log.level,
    traces_endpoint: Annotated[str | None, typer.Option(help="OTLP endpoint, as in http://localhost:4317.")] = None,
    ray_enabled: Annotated[
        bool, typer.Option("--ray", help="Many replicas on a Ray cluster behind one entry.")
    ] = False,
    ray_address: Annotated[
        str, typer.Option(help="local: a cluster on this machine alone; auto: the one it is part of; or HOST:PORT.")
    ] = DEFAULTS.ray.address,
    ray_replicas: Annotated[int, typer.Option(min=1, help="Engines, unless they are scaled.")] = DEFAULTS.ray.replicas,
    ray_gpus: Annotated[float, typer.Option(min=0.0, help="GPUs of each replica.")] = DEFAULTS.ray.gpus,
    ray_min_replicas: Annotated[int | None, typer.Option(min=0, help="Scale replicas: at least.")] = None,
    ray_max_replicas: Annotated[int | None, typer.Option(min=1, help="Scale replicas: at most.")] = None,
    ray_target_ongoing_requests: Annotated[
        float | None, typer.Option(help="Scale replicas: requests that each should have.")
    ] = None,
    ray_upscale_delay_s: Annotated[float | None, typer.Option(help="Scale replicas: patience upwards.")] = None,
    ray_downscale_delay_s: Annotated[float | None, typer.Option(help="Scale replicas: patience downwards.")] = None,
) -> None:
    """Serve a repertoire over gRPC until SIGTERM or SIGINT."""
    chosen = load_config(config, given_flags(context, locals()))
    if print_config:
        typer.echo(as_toml(chosen), nl=False)
        return
    serve_as(chosen)


def given_flags(context: typer.Context, values: dict[str, Any]) -> dict[str, Any]:
    """What was typed on the command line, or given in the environment, and is no question of how to read it."""
    return {
        name: values[name]
        for name in context.params
        if name not in {"config", "print_config"}
        and (source := context.get_parameter_source(name)) is not None
        and source.name in {"COMMANDLINE", "ENVIRONMENT"}
    }


def serve_as(chosen: ServeConfig) -> None:
    """Serve what the configuration says until a signal comes."""
    chosen.ray.check_enabled()
    if chosen.ray.enabled:
        from greenroom.cli.serve_ray import serve_on_ray

        serve_on_ray(chosen)
        return
    gc.disable()  # what is loaded stays; to look through it again and again takes a tenth of the start
    try:
        _serve_here(chosen)
    finally:
        gc.enable()


def _serve_here(chosen: ServeConfig) -> None:
    engine_flags = chosen.engine_flags()
    from greenroom.cli.build_engine import build_engine, open_repertoire
    from greenroom.cli.serve_parts import logging_as, make_front, make_server, serving_metrics, tracing_as
    from runtime.engine.follower import HeadFollower
    from runtime.service.lifecycle import serve_until_signal

    logging_as(chosen.log)
    with tracing_as(chosen.traces) as tracing:
        engine = build_engine(engine_flags)
        follower = HeadFollower(open_repertoire(engine_flags), engine, interval_s=chosen.server.follow)
        try:
            server, guard = make_server(chosen, engine, follower, tracing)
            front = make_front(chosen, server, guard)
            if chosen.server.follow:
                follower.start()

            def on_ready(bound_port: int) -> None:
                gc.enable()
                if chosen.server.ready_file is not None:
                    write_atomically(chosen.server.ready_file, f"{bound_port}\n")
                typer.echo(f"serving on {chosen.server.host}:{bound_port}")
                if front is not None:
                    typer.echo(f"http on {front.url}")

            with serving_metrics(chosen.metrics, guard.metrics):
                asyncio.run(serve_until_signal(server, on_ready=on_ready, front=front))
        finally:
            follower.close()
            engine.close()


def write_atomically(path: Path, text: str) -> None:
    """Write a file that readers see either whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
