"""`greenroom serve`: an engine behind gRPC until a signal comes.

It knows nothing of how an engine is built or a server drains.
Read first: it prints "serving on HOST:PORT" when requests are taken, and writes the port to `--ready-file` then.
"""

import asyncio
import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from greenroom.cli import engine_flags as flags
from runtime.service.models import DEFAULT_NAME


def serve(
    *,
    repertoire: flags.RepertoireFlag,
    trust: flags.TrustFlag = None,
    base: flags.BaseFlag = None,
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to bind; 0 takes a free one.")] = 50051,
    name: Annotated[
        str, typer.Option(help="What OpenAI and Triton clients call the repertoire: model NAME or NAME:TASK.")
    ] = DEFAULT_NAME,
    expert_memory: flags.ExpertMemoryFlag = flags.DEFAULT_EXPERT_MEMORY,
    kv_memory: flags.KvMemoryFlag = flags.DEFAULT_KV_MEMORY,
    max_running: flags.MaxRunningFlag = flags.LIMITS.max_running,
    policy: flags.PolicyFlag = flags.LIMITS.policy,
    eviction: flags.EvictionFlag = flags.LIMITS.eviction,
    prefetch: flags.PrefetchFlag = flags.LIMITS.prefetch,
    dtype: flags.DtypeFlag = flags.DEFAULT_DTYPE,
    threads: flags.ThreadsFlag = flags.DEFAULT_THREADS,
    grace: Annotated[float, typer.Option(min=0.0, max=3600.0, help="Seconds running requests get at the end.")] = 10.0,
    follow: Annotated[
        float, typer.Option(min=0.0, help="Seconds between looks for a new generation; 0 never looks.")
    ] = 2.0,
    ready_file: Annotated[Path | None, typer.Option(help="File to write the port to when ready.")] = None,
) -> None:
    """Serve a repertoire over gRPC until SIGTERM or SIGINT."""
    chosen = flags.collect(
        repertoire=repertoire,
        trust=trust,
        base=base,
        dtype=dtype,
        threads=threads,
        expert_memory=expert_memory,
        kv_memory=kv_memory,
        max_running=max_running,
        policy=policy,
        eviction=eviction,
        prefetch=prefetch,
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")

    from greenroom.cli.build_engine import build_engine, open_repertoire
    from runtime.engine.follower import HeadFollower
    from runtime.service.lifecycle import serve_until_signal
    from runtime.service.server import Server

    def on_ready(bound_port: int) -> None:
        if ready_file is not None:
            write_atomically(ready_file, f"{bound_port}\n")
        typer.echo(f"serving on {host}:{bound_port}")

    engine = build_engine(chosen)
    follower = HeadFollower(open_repertoire(chosen), engine, interval_s=follow)
    if follow:
        follower.start()
    try:
        asyncio.run(
            serve_until_signal(Server(engine, host=host, port=port, grace_s=grace, name=name), on_ready=on_ready)
        )
    finally:
        follower.close()
        engine.close()


def write_atomically(path: Path, text: str) -> None:
    """Write a file that readers see either whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
