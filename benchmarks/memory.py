"""Expert memory, measured: many registered experts, cold against warm, budgets smaller than the working set, guesses.

It prints JSON rows and writes benchmarks/results/memory.json; figures are ratios of medians taken in one run.
Read first: run it on a quiet machine. Synthetic experts of rank 8 on the real base; see `benchmarks/synthetic.py`.

    python benchmarks/memory.py --folder build/memory
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import resource
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from synthetic import make_repertoire, name_of, prompt_of

from greenroom.cli.places import cache_folder
from runtime.engine.engine import Engine
from runtime.engine.llama import LlamaModel
from runtime.engine.options import EngineOptions
from runtime.engine.request import Event, Failed, Finished, Request, SamplingParams
from runtime.model.base import BaseModel, load_base, resolve_base
from runtime.model.generation import open_generation
from runtime.model.repertoire import Repertoire

RANK = 8
NEW_TOKENS = 16


class Asked:
    """One request on its way; `first_s` and `total_s` once it has ended."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._last: Event | None = None

    def sink(self, event: Event) -> None:
        """Take an event."""
        if isinstance(event, Finished | Failed):
            self._last = event
            self._ended.set()

    def wait(self) -> Finished:
        """Wait for the end."""
        self._ended.wait()
        if isinstance(self._last, Failed):
            raise self._last.error
        assert isinstance(self._last, Finished)
        return self._last


class Bench:
    """Engines over one set of base weights."""

    def __init__(self, model: LlamaModel, base: BaseModel) -> None:
        self.model, self.base = model, base
        self._count = 0

    @contextmanager
    def engine(self, repertoire: Repertoire, **options: object):  # noqa: ANN201
        """A started engine that is closed in the end."""
        engine = Engine(
            self.model,
            self.base.tokenizer,
            self.base.eos_token_ids,
            repertoire=repertoire,
            generation=open_generation(repertoire, routers=False),
            options=EngineOptions(max_context=256, prefix_budget_bytes=0, **options),  # type: ignore[arg-type]
        )
        engine.start()
        try:
            yield engine
        finally:
            engine.close()
            engine.check_integrity()

    def submit(self, engine: Engine, task: int, *, pinned: bool, num_tokens: int = NEW_TOKENS) -> Asked:
        """Ask the prompt of a task."""
        self._count += 1
        asked = Asked()
        request = Request(
            request_id=str(self._count),
            text=prompt_of(task),
            task=name_of(task) if pinned else None,
            sampling=SamplingParams(max_tokens=num_tokens, ignore_eos=True),
        )
        engine.submit(request, asked.sink)
        return asked

    def throughput(self, engine: Engine, tasks: Sequence[int], *, width: int, pinned: bool = True) -> float:
        """Tokens per second of these requests, `width` in flight at a time."""
        started, flying, left = time.perf_counter(), [], list(tasks)
        while flying or left:
            while left and len(flying) < width:
                flying.append(self.submit(engine, left.pop(0), pinned=pinned))
            flying.pop(0).wait()
        return len(tasks) * NEW_TOKENS / (time.perf_counter() - started)


def drop_page_cache(repertoire: Repertoire) -> None:
    """Ask the kernel to forget the blobs."""
    os.sync()
    for path in (repertoire.root / "blobs").rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def set_bytes(repertoire: Repertoire) -> int:
    """Bytes of one task in memory: the units of its expert set, and its routers (a row of D float32 per unit)."""
    manifest = repertoire.manifest()
    return sum(unit.bytes + manifest.base.width * 4 for unit in manifest.experts[0].units)


def registered(bench: Bench, few: Repertoire, many: Repertoire, repeats: int) -> dict[str, float]:
    """Throughput of the same 8 sequences of 5 tasks with 5 and with 1,000 tasks registered; start-up per task."""
    speeds: dict[str, list[float]] = {"few": [], "many": []}
    startup = {}
    for name, repertoire in (("few", few), ("many", many)):
        started = time.perf_counter()
        opened = open_generation(repertoire, routers=False)
        startup[name] = (time.perf_counter() - started) / len(opened.manifest.tasks)
        del opened
    for _ in range(repeats):
        for name, repertoire in (("few", few), ("many", many)):
            with bench.engine(repertoire) as engine:
                tasks = [i % 5 for i in range(8)]
                bench.throughput(engine, tasks, width=8)
                speeds[name].append(bench.throughput(engine, tasks * 4, width=8))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "throughput_1000_over_5": medians["many"] / medians["few"],
        "startup_ms_per_task_5": 1e3 * startup["few"],
        "startup_ms_per_task_1000": 1e3 * startup["many"],
    }


def first_tokens(bench: Bench, repertoire: Repertoire, tasks: Sequence[int], *, prefetch: bool) -> dict[str, float]:
    """Median seconds to the first token, located, one request at a time: experts on disk, then in memory."""
    with bench.engine(repertoire, prefetch=prefetch) as engine:
        bench.submit(engine, 0, pinned=True, num_tokens=2).wait()
        cold = [bench.submit(engine, task, pinned=False, num_tokens=2).wait().usage.first_token_s for task in tasks]
        warm = [bench.submit(engine, task, pinned=False, num_tokens=2).wait().usage.first_token_s for task in tasks]
    return {"cold": statistics.median(cold), "warm": statistics.median(warm)}


def cold_and_warm(bench: Bench, repertoire: Repertoire) -> dict[str, float]:
    """Time to first token of absent experts over that of resident ones."""
    tasks = range(8, 40)
    figures = {}
    for prefetch in (True, False):
        for cache in ("warm", "cold"):
            if cache == "cold":
                drop_page_cache(repertoire)
            times = first_tokens(bench, repertoire, tasks, prefetch=prefetch)
            name = f"cold_over_warm_ttft_{'prefetch' if prefetch else 'off'}_{cache}_pages"
            figures[name] = times["cold"] / times["warm"]
    return {"cold_over_warm_ttft": figures["cold_over_warm_ttft_prefetch_warm_pages"], **figures}


def zipf(num_tasks: int, count: int, seed: int) -> list[int]:
    """Tasks of `count` requests, popularity 1/rank."""
    weights = [1 / (1 + task) for task in range(num_tasks)]
    return random.Random(seed).choices(range(num_tasks), weights, k=count)


def pressure(bench: Bench, repertoire: Repertoire, num_tasks: int, repeats: int) -> dict[str, object]:
    """Throughput under Zipf traffic as the working set grows past the budget, over that with everything resident."""
    size = set_bytes(repertoire)
    curve = []
    for share in (0.5, 1.0, 1.5, 2.0, 3.0, 4.0):
        ratios = []
        for repeat in range(repeats):
            tasks = zipf(num_tasks, 64, seed=repeat)
            speeds = []
            for budget in (num_tasks * size, int(num_tasks * size / share)):
                with bench.engine(repertoire, expert_budget_bytes=budget) as engine:
                    bench.throughput(engine, range(num_tasks), width=4)
                    speeds.append(bench.throughput(engine, tasks, width=4, pinned=False))
            ratios.append(speeds[1] / speeds[0])
        curve.append({"working_set_over_budget": share, "throughput_over_resident": statistics.median(ratios)})
    at_two = next(point for point in curve if point["working_set_over_budget"] == 2.0)
    return {"throughput_at_2x_over_resident": at_two["throughput_over_resident"], "curve": curve}


def churn(bench: Bench, repertoire: Repertoire, num_tasks: int, repeats: int) -> dict[str, float]:
    """P99 of the time to first token with guesses over that without, working set twice the budget."""
    budget = num_tasks * set_bytes(repertoire) // 2
    p99: dict[bool, list[float]] = {True: [], False: []}
    useful = wasted = demanded = 0
    for repeat in range(repeats):
        tasks = zipf(num_tasks, 96, seed=100 + repeat)
        for prefetch in (True, False):
            with bench.engine(repertoire, expert_budget_bytes=budget, prefetch=prefetch) as engine:
                times = []
                flying: list[Asked] = []
                for task in tasks:
                    flying.append(bench.submit(engine, task, pinned=False, num_tokens=4))
                    if len(flying) == 2:
                        times.append(flying.pop(0).wait().usage.first_token_s)
                times += [asked.wait().usage.first_token_s for asked in flying]
                p99[prefetch].append(sorted(times)[int(0.99 * len(times))])
                memory = engine.statistics().memory
                if prefetch:
                    useful += memory.prefetch_useful_bytes
                    wasted += memory.prefetch_wasted_bytes
                    demanded += memory.demanded_bytes
    return {
        "p99_ttft_prefetch_over_off": statistics.median(p99[True]) / statistics.median(p99[False]),
        "prefetch_precision": useful / max(1, useful + wasted),
        "prefetch_recall": useful / max(1, useful + demanded),
        "wasted_bytes_share": wasted / max(1, useful + wasted),
    }


def main() -> None:
    """Run everything, print rows, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/memory"), help="where synthetic repertoires go")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--many", type=int, default=1000, help="tasks in the large repertoire")
    parser.add_argument("--working-set", type=int, default=16, help="tasks of the Zipf traffic")
    options = parser.parse_args()
    base = load_base(resolve_base("smollm2", cache=cache_folder()), dtype=torch.float32, device=torch.device("cpu"))
    few = make_repertoire(options.folder / "few", base, 5, rank=RANK, locate=False)
    some = make_repertoire(options.folder / "some", base, 64, rank=RANK, locate=True)
    many = make_repertoire(options.folder / "many", base, options.many, rank=RANK, locate=False)
    bench = Bench(LlamaModel(base.model, max_context=256), base)
    gc.collect()
    results: dict[str, object] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f} at the start",
        "command": "python " + " ".join(sys.argv),
        "expert_set_bytes": set_bytes(few),
    }
    for name, part in (
        ("registered", lambda: registered(bench, few, many, options.repeats)),
        ("cold_and_warm", lambda: cold_and_warm(bench, some)),
        ("pressure", lambda: pressure(bench, some, options.working_set, options.repeats)),
        ("churn", lambda: churn(bench, some, options.working_set, options.repeats)),
    ):
        figures = part()
        print(json.dumps({"part": name, **figures}), flush=True)
        results |= figures
    results["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    target = Path(__file__).parent / "results" / "memory.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {target}")


if __name__ == "__main__":
    main()
