"""The service under load and faults, and what it costs beside the engine alone; bounded, on loopback only.

It prints JSON rows and writes benchmarks/results/service.json. Clients run in a process of their own.
Read first: run it on a quiet machine. `--base` takes another base than smollm2, for a quick try.

    python benchmarks/service.py --folder build/service
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Self

os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from service_clients import STREAM_PROMPTS
from synthetic import make_repertoire

from greenroom.cli.places import cache_folder
from greenroom.cli.serve_config import DEFAULTS
from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.engine.request import Event, Failed, Finished, Request, SamplingParams
from runtime.engine.step_model import load_dtype, make_step_model
from runtime.model.base import load_base, resolve_base
from runtime.model.generation import open_generation
from runtime.service.guard import Guard
from runtime.service.lifecycle import leave_to_the_end
from runtime.service.server import Server

NUM_TASKS = 8
BATCH = 8
SETTLE_S = 20.0
COALESCE_S = DEFAULTS.server.coalesce


class Serving:
    """A server on a thread with its own event loop."""

    def __init__(self, engine: Engine) -> None:
        self.guard = Guard()
        self._server = Server(engine, host="127.0.0.1", port=0, grace_s=10.0, guard=self.guard, coalesce_s=COALESCE_S)
        self._bound: Future[int] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._leave = asyncio.Event()
        port = await self._server.start()
        await self._server.wait_ready()
        leave_to_the_end()
        self._bound.set_result(port)
        await self._leave.wait()
        await self._server.stop()

    def __enter__(self) -> Self:
        self._thread.start()
        self.target = f"127.0.0.1:{self._bound.result()}"
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._leave.set)
        self._thread.join()

    def num_tasks(self) -> int:
        """Tasks of the event loop now."""

        async def count() -> int:
            return len(asyncio.all_tasks()) - 1

        return asyncio.run_coroutine_threadsafe(count(), self.loop).result()


@contextmanager
def clients(*arguments: str):  # noqa: ANN201
    """The process of the clients; one line of JSON in, one out."""
    command = [sys.executable, str(Path(__file__).parent / "service_clients.py"), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.stdin.close()
            process.wait()


def ask(process: subprocess.Popen[str], question: dict[str, object]) -> dict[str, object]:
    """Send the clients one question and wait for what they say."""
    process.stdin.write(json.dumps(question) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def held(engine: Engine, serving: Serving) -> dict[str, int]:
    """What a leak would let grow."""
    now = engine.statistics()
    return {
        "kv_bytes": now.kv_bytes_reserved,
        "expert_references": now.memory.reserved_bytes,
        "requests": now.running + now.waiting,
        "tasks": serving.num_tasks(),
        "file_handles": len(list(Path("/proc/self/fd").iterdir())),
    }


def leaks(engine: Engine, serving: Serving, before: dict[str, int]) -> dict[str, int]:
    """What is held above `before`, after everything had time to be given back."""
    end = time.monotonic() + SETTLE_S
    while True:
        after = held(engine, serving)
        more = {name: max(0, after[name] - before[name]) for name in before}
        if not any(more.values()) or time.monotonic() > end:
            return more
        time.sleep(0.2)


def calls(serving: Serving) -> tuple[int, int]:
    """Calls begun and calls ended, as the server counts them."""
    lines = [line.split() for line in serving.guard.metrics.exposition().decode().splitlines() if line[0] != "#"]
    return tuple(  # type: ignore[return-value]
        sum(int(float(value)) for name, value in lines if name.startswith(f"grpc_server_{what}_total{{"))
        for what in ("started", "handled")
    )


def load_and_faults(engine: Engine, streams: int, seconds: float) -> dict[str, object]:
    """Many streams with cancellations, deadlines, disconnects and bad requests, and health beside them."""
    with Serving(engine) as serving:
        with clients("load", serving.target) as process:
            ask(process, {"streams": streams, "seconds": 2.0, "seed": 1})
        leaks(engine, serving, dict.fromkeys(held(engine, serving), 0) | {"tasks": 99, "file_handles": 999})
        before, begun = held(engine, serving), calls(serving)
        with clients("load", serving.target) as process:
            said = ask(process, {"streams": streams, "seconds": seconds, "seed": 2})
        more = leaks(engine, serving, before)
        started, handled = (now - then for now, then in zip(calls(serving), begun, strict=True))
    engine.check_integrity()
    return {
        "requests": said["requests"],
        "outcomes": said["outcomes"],
        "unaccounted_requests": said["unaccounted"] + abs(started - handled),
        "unexpected": said["unexpected"],
        "calls_started": started,
        "calls_handled": handled,
        "leaks": {
            "kv_pages": more["kv_bytes"],
            "expert_references": more["expert_references"],
            "tasks": more["tasks"],
            "file_handles": more["file_handles"],
        },
        "health_checks": said["health_checks"],
        "health_p50_ms": said["health_p50_ms"],
        "health_p99_ms": said["health_p99_ms"],
        "health_max_ms": said["health_max_ms"],
    }


def directly(engine: Engine, num_tokens: int) -> float:
    """Tokens per second of `BATCH` requests given to the engine."""
    ended = threading.Semaphore(0)
    failures: list[Exception] = []

    def sink(event: Event) -> None:
        if isinstance(event, Failed):
            failures.append(event.error)
        if isinstance(event, Finished | Failed):
            ended.release()

    started = time.perf_counter()
    for number, prompt in enumerate(STREAM_PROMPTS[:BATCH]):
        sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        engine.submit(Request(request_id=f"d{number}-{started}", text=prompt, sampling=sampling), sink)
    for _ in range(BATCH):
        ended.acquire()
    if failures:
        raise failures[0]
    return BATCH * num_tokens / (time.perf_counter() - started)


def overhead(engine: Engine, num_tokens: int, repeats: int) -> dict[str, float]:
    """The same requests through the service and without it, in turns."""
    alone, served = [], []
    with Serving(engine) as serving, clients("streams", serving.target) as process:
        question = {"streams": BATCH, "tokens": num_tokens}
        directly(engine, num_tokens)
        ask(process, question)
        for _ in range(repeats):
            alone.append(directly(engine, num_tokens))
            served.append(BATCH * num_tokens / float(ask(process, question)["seconds"]))  # type: ignore[arg-type]
    ratios = [through / direct for direct, through in zip(alone, served, strict=True)]
    return {
        "throughput_over_engine": statistics.median(ratios),
        "engine_tokens_per_s": statistics.median(alone),
        "service_tokens_per_s": statistics.median(served),
        "step_ms": 1e3 * BATCH / statistics.median(alone),
    }


def main() -> None:
    """Run both parts, print rows, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path("build/service"), help="where the synthetic repertoire goes"
    )
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--dtype", default=DEFAULTS.engine.dtype, help="of the base's weights")
    parser.add_argument("--threads", type=int, default=DEFAULTS.engine.threads)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer, for the overhead")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--part", choices=("all", "load", "overhead"), default="all")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "service.json")
    options = parser.parse_args()
    folder, dtype = resolve_base(options.base, cache=cache_folder()), load_dtype(options.dtype)
    base = load_base(folder, dtype=dtype, device=torch.device("cpu"))
    repertoire = make_repertoire(options.folder, base, NUM_TASKS, rank=8, locate=True)
    threads = options.threads or torch.get_num_threads()
    model = make_step_model(
        base.model,
        max_context=512,
        weights=options.dtype,
        step=DEFAULTS.engine.step,
        folder=cache_folder() / "native",
        threads=threads,
    )
    results: dict[str, object] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f} at the start",
        "command": "python " + " ".join(sys.argv),
        "weights": options.dtype,
        "step": type(model).__name__,
        "threads": threads,
    }
    parts = {
        "load": lambda engine: load_and_faults(engine, options.streams, options.seconds),
        "overhead": lambda engine: overhead(engine, options.tokens, options.repeats),
    }
    for name, part in parts.items():
        if options.part not in ("all", name):
            continue
        engine = Engine(
            model,
            base.tokenizer,
            base.eos_token_ids,
            repertoire=repertoire,
            generation=open_generation(repertoire),
            options=EngineOptions(max_context=512, max_running=16, expert_budget_bytes=64 << 20),
        )
        try:
            figures = part(engine)
        finally:
            engine.close()
        print(json.dumps({"part": name, **figures}), flush=True)
        results |= figures
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
