"""Expert memory, measured: many registered experts, cold against warm, budgets smaller than the working set, guesses.

It prints JSON rows and writes benchmarks/results/memory.json and memory.png, and from them the table of docs/MEMORY.md;
figures are ratios taken in one run.
Read first: run it on a quiet machine; what is compared takes turns, so that a slow minute slows both. Synthetic experts
on the real base, the engine as it is served by default. A prompt is a task's own words and an input that differs from
request to request, so guesses can be wrong. `docs/MEMORY.md` says what each workload stands for.

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
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from memory_table import RESULTS, write_table
from on_demand import OnDemand
from synthetic import make_repertoire, name_of

from greenroom.cli.places import cache_folder
from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.engine.request import Event, Failed, Finished, Request, SamplingParams
from runtime.engine.step_model import make_step_model
from runtime.engine.step_protocol import StepModel
from runtime.kernels.inspection import Inspected, Inspector
from runtime.kernels.native_build import vector_kinds
from runtime.memory import memory as memory_module
from runtime.memory.memory import ExpertMemory
from runtime.memory.visible import VisibleSets
from runtime.model.base import BaseModel, load_base, resolve_base
from runtime.model.generation import open_generation
from runtime.model.manifest import BaseRef, ExpertSet, Manifest, Unit
from runtime.model.repertoire import Repertoire
from runtime.model.side_by_side import Allocate, fresh_memory
from runtime.service.lifecycle import leave_to_the_end

RANK = 8
LARGE_RANK = 64
LAYOUT = "rows"
"""How experts lie in what is made; part of the path, so that nothing is taken over that was made another way."""
VOLUME = 200e6
"""Bytes per second of a network volume."""
FIRST_BYTE_S = 0.1
"""Until an object store begins to answer."""
PASSES = 3
"""How often every sequence of arrivals is asked each way."""
SHARES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
WORDS = (Path(__file__).parent / "words.txt").read_text().split()


def prompt(task: int, variant: int = 0, *, num_words: int = 96) -> str:
    """Three quarters of the words are the task's own; the rest is the request's."""
    own = random.Random(task).choices(WORDS, k=3 * num_words // 4)
    return " ".join([*own, *random.Random(f"{task}/{variant}").choices(WORDS, k=num_words // 4)])


def short_prompt(task: int, variant: int = 0) -> str:
    """The same in eight words."""
    return prompt(task, variant, num_words=8)


Item = TypeVar("Item")


class Asked:
    """One request on its way."""

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

    def first_s(self) -> float:
        """Seconds to the first token."""
        return self.wait().usage.first_token_s


class Served:
    """An engine with requests to it."""

    def __init__(self, engine: Engine, prompt: Callable[[int, int], str]) -> None:
        self.engine, self.prompt = engine, prompt
        self._count = 0

    def ask(self, task: int, *, num_tokens: int, pinned: bool = False) -> Asked:
        """Ask something of a task, which is located unless it is pinned."""
        self._count += 1
        request = Request(
            request_id=str(self._count),
            text=self.prompt(task, self._count),
            task=name_of(task) if pinned else None,
            sampling=SamplingParams(max_tokens=num_tokens, ignore_eos=True),
        )
        asked = Asked()
        self.engine.submit(request, asked.sink)
        return asked

    def burst(self, tasks: Sequence[int], *, width: int, num_tokens: int, pinned: bool = False) -> float:
        """Tokens per second of these requests, `width` in flight at a time."""
        started, flying = time.perf_counter(), list[Asked]()
        for task in tasks:
            if len(flying) == width:
                flying.pop(0).wait()
            flying.append(self.ask(task, num_tokens=num_tokens, pinned=pinned))
        for asked in flying:
            asked.wait()
        return len(tasks) * num_tokens / (time.perf_counter() - started)


class Bench:
    """Engines over one set of base weights."""

    def __init__(self, model: StepModel, base: BaseModel) -> None:
        self.model, self.base = model, base

    @contextmanager
    def serve(
        self,
        repertoire: Repertoire,
        *,
        prompt: Callable[[int, int], str] = prompt,
        on_demand: bool = False,
        **options: object,
    ) -> Iterator[Served]:
        """A started engine that has read its densities; closed in the end."""
        limits = {"max_context": 256, "prefix_budget_bytes": 0, "kv_budget_bytes": 128 << 20, **options}
        generation = open_generation(repertoire, routers=False)
        generation.densities.locators()
        with patch.object(memory_module, "Loader", OnDemand) if on_demand else nullcontext():
            engine = Engine(
                self.model,
                self.base.tokenizer,
                self.base.eos_token_ids,
                repertoire=repertoire,
                generation=generation,
                options=EngineOptions(**limits),  # type: ignore[arg-type]
            )
        engine.start()
        leave_to_the_end()  # as a server does; else a tail is a garbage collection that looks through all of torch
        try:
            yield Served(engine, prompt)
        finally:
            engine.close()
            gc.unfreeze()
            engine.check_integrity()


def drop_pages(repertoire: Repertoire, manifest: Manifest, task: int) -> None:
    """Let the kernel forget the bytes of a task's experts and routers: the next read comes from the disk."""
    for digest in (manifest.experts[task].digest, manifest.tasks[task].router.digest):
        descriptor = os.open(repertoire.blob_path(digest), os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def into_page_cache(root: Path) -> None:
    """Let the kernel have read every blob of a repertoire."""
    for path in (root / "blobs").rglob("*"):
        if path.is_file():
            path.read_bytes()


def set_bytes(repertoire: Repertoire) -> int:
    """Bytes of one task in memory: the units of its expert set, and its routers (a row of D float32 per unit)."""
    manifest = repertoire.manifest()
    return sum(unit.bytes + manifest.base.width * 4 for unit in manifest.experts[0].units)


# ---- many registered


def registered(bench: Bench, few: Repertoire, many: Repertoire, repeats: int) -> dict[str, object]:
    """Throughput of 8 sequences of 5 tasks with 5 and with 1,000 tasks registered; start-up and memory of each."""
    ratios = []
    with bench.serve(few) as small, bench.serve(many) as large:
        for repeat in range(2 * repeats + 1):
            speeds = [s.burst([i % 5 for i in range(16)], width=8, num_tokens=16, pinned=True) for s in (small, large)]
            if repeat:
                ratios.append(speeds[1] / speeds[0])
    rows = {name: in_child("startup", repertoire.root) for name, repertoire in (("few", few), ("many", many))}
    return {"throughput_1000_over_5": statistics.median(ratios), "startup": rows}


def in_child(part: str, folder: Path) -> dict[str, float]:
    """What a fresh process measures: `part` on a repertoire."""
    command = [sys.executable, __file__, "--folder", str(folder), "--child", part]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # type: ignore[no-any-return]


def startup(folder: Path) -> dict[str, float]:
    """Of a process without a base: what it costs to open a generation, and to have 5 tasks' experts in memory."""
    repertoire = Repertoire(folder)
    sizes = [_rss()]
    started = time.perf_counter()
    generation = open_generation(repertoire, routers=False)
    opened_s = time.perf_counter() - started
    sizes.append(_rss())
    memory = ExpertMemory(budget_bytes=64 << 20)
    visible = VisibleSets(repertoire, max_rank=LARGE_RANK)
    held = [memory.reserve(visible.of(generation, name_of(task))) for task in range(5)]
    while not all(reservation is not None and reservation.ready for reservation in held):
        time.sleep(0.01)
    sizes.append(_rss())
    generation.densities.locators()
    sizes.append(_rss())
    num_tasks = len(generation.manifest.tasks)
    steps = [(after - before) / 1e6 for before, after in pairwise(sizes)]
    return {
        "tasks": num_tasks,
        "ms_per_task": 1e3 * opened_s / num_tasks,
        "manifest_mb": steps[0],
        "experts_of_5_tasks_mb": steps[1],
        "densities_mb": steps[2],
    }


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- cold against warm


def cold_and_warm(bench: Bench, long: Repertoire, short: Repertoire, num_tasks: int, rounds: int) -> dict[str, object]:
    """Time to first token of absent experts over that of resident ones, one request at a time, right after another.

    In every round new engines read every task for their first time, so nothing that a load leaves behind helps another;
    what is compared takes turns task by task. A task is evicted again once it was measured, so that the next one finds
    memory that was used before, as in a server whose budget is full; "growing" keeps all tasks, as one that has just
    been started does.
    """
    figures: dict[str, object] = {}
    for length, repertoire, words in (("", long, prompt), ("_short_prompt", short, short_prompt)):
        pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for number in range(rounds):
            for name, pair in first_tokens(bench, repertoire.root, words, range(num_tasks), turn=number):
                pairs[name].append(pair)
        for name, found in pairs.items():
            figures[f"cold_over_warm_ttft{length}_{name}"] = ratio_of_medians(found)
            figures[f"cold_over_warm_ttft{length}_{name}_interval"] = interval(found, ratio_of_medians)
        warm = [pair[1] for found in pairs.values() for pair in found]
        figures |= {f"warm_ttft{length}_ms": 1e3 * statistics.median(warm), f"cold_samples{length}": len(found)}
    return {"cold_over_warm_ttft": figures["cold_over_warm_ttft_prefetch_warm_pages"], **figures}


def first_tokens(
    bench: Bench, root: Path, words: Callable[[int, int], str], tasks: Sequence[int], *, turn: int
) -> Iterator[tuple[str, tuple[float, float]]]:
    """One round: for every task but the first and every way of loading it, its seconds when absent and when there."""
    ways = {
        "prefetch_warm_pages": {"prefetch": True},
        "prefetch_cold_pages": {"prefetch": True},
        "off_warm_pages": {"prefetch": False},
        "off_cold_pages": {"prefetch": False},
        "prefetch_growing": {"prefetch": True},
    }
    with ExitStack() as open_engines:
        engines = [
            (name, open_engines.enter_context(bench.serve(Repertoire(root), prompt=words, **options)))
            for name, options in ways.items()
        ]
        into_page_cache(root)
        for task in tasks:
            for name, served in rotated(engines, turn + task):
                if name.endswith("cold_pages"):
                    drop_pages(Repertoire(root), served.engine.generation.manifest, task)
                cold, warm = (served.ask(task, num_tokens=1).first_s() for _ in range(2))
                if task:  # the first makes buffers and opens files
                    yield name, (cold, warm)
                if not name.endswith("growing"):
                    served.engine.evict(name_of(task))


def ratio_of_medians(pairs: Sequence[tuple[float, float]]) -> float:
    """The median of the first of each pair over that of the second."""
    cold, warm = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    return cold / warm


def interval(
    samples: Sequence[Item], ratio: Callable[[Sequence[Item]], float], *, draws: int = 1000
) -> tuple[float, float]:
    """Where 95 % of the ratios lie when the samples are drawn anew with replacement (bootstrap)."""
    chance = random.Random(0)
    ratios = [ratio(chance.choices(samples, k=len(samples))) for _ in range(draws)]
    return percentile(ratios, 0.025), percentile(ratios, 0.975)


def rotated(ways: Sequence[Item], turn: int) -> list[Item]:
    """The same ways, beginning with another one in every turn."""
    begin = turn % len(ways)
    return [*ways[begin:], *ways[:begin]]


# ---- budgets smaller than the working set


def zipf(num_tasks: int, count: int, seed: int) -> list[int]:
    """Tasks of `count` requests, popularity 1/rank."""
    weights = [1 / (1 + task) for task in range(num_tasks)]
    return random.Random(seed).choices(range(num_tasks), weights, k=count)


def pressure(bench: Bench, repertoire: Repertoire, num_tasks: int, repeats: int) -> dict[str, object]:
    """Throughput under Zipf traffic as the working set grows past the budget, over that with everything resident."""
    size = set_bytes(repertoire)
    curve = []
    for share in SHARES:
        ratios = []
        budget = max(4 * size, int(num_tasks * size / share))
        with (
            bench.serve(repertoire, expert_budget_bytes=2 * num_tasks * size, prefetch=True) as resident,
            bench.serve(repertoire, expert_budget_bytes=budget) as bounded,
        ):
            for served in (resident, bounded):
                served.burst(range(num_tasks), width=4, num_tokens=2)
            for repeat in range(repeats):
                tasks = zipf(num_tasks, 12, seed=repeat)
                speeds = [served.burst(tasks, width=4, num_tokens=16) for served in (resident, bounded)]
                ratios.append(speeds[1] / speeds[0])
            memory = bounded.engine.statistics().memory
        hits = memory.hits / (memory.hits + memory.misses)
        curve.append(
            {
                "working_set_over_budget": share,
                "throughput_over_resident": statistics.median(ratios),
                "hit_rate": hits,
            }
        )
    at_two = next(point for point in curve if point["working_set_over_budget"] == 2.0)
    return {"throughput_at_2x_over_resident": at_two["throughput_over_resident"], "curve": curve}


# ---- churn


class SlowStorage(Repertoire):
    """The same repertoire as slower storage would give it; who reads waits, computes nothing, and then has the bytes.

    Its blobs should be in the page cache: what this machine's disk takes is no part of another storage.

    Args:
        root: of the repertoire.
        bytes_per_s: of a volume that serves one read at a time; None for as many as one likes.
        first_byte_s: until the first bytes of a blob come; all its others come with them.
    """

    def __init__(self, root: Path, *, bytes_per_s: float | None = None, first_byte_s: float = 0.0) -> None:
        super().__init__(root)
        self._bytes_per_s, self._first_byte_s = bytes_per_s, first_byte_s
        self._volume = threading.Lock()
        self._due: dict[str, float] = {}

    def read_units(
        self,
        entry: ExpertSet,
        units: Sequence[Unit],
        base: BaseRef,
        *,
        allocate: Allocate = fresh_memory,
        inspector: Inspector | None = None,
    ) -> list[Inspected]:
        """As `Repertoire.read_units`, later."""
        if self._bytes_per_s is not None:
            with self._volume:
                time.sleep(sum(unit.bytes for unit in units) / self._bytes_per_s)
        if units[0] is entry.units[0]:
            self._due[entry.digest] = time.perf_counter() + self._first_byte_s
        time.sleep(max(0.0, self._due.get(entry.digest, 0.0) - time.perf_counter()))
        return super().read_units(entry, units, base, allocate=allocate, inspector=inspector)

    def read_tensors(self, digest: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """As `Repertoire.read_tensors`, later."""
        time.sleep(self._first_byte_s)
        return super().read_tensors(digest, shapes)


def churn(bench: Bench, repertoire: Repertoire, num_tasks: int, repeats: int) -> dict[str, object]:
    """P99 of the time to first token with guesses over those without and on demand; the same on slower storage."""
    volume = SlowStorage(repertoire.root, bytes_per_s=VOLUME)
    distant = SlowStorage(repertoire.root, first_byte_s=FIRST_BYTE_S)
    figures = churn_on(bench, repertoire, num_tasks, 2 * repeats, forget=True)
    for name, storage, loaders in (("slow_disk", volume, 2), ("distant", distant, 96)):
        there = churn_on(bench, storage, num_tasks, 2 * repeats, num_loaders=loaders)
        figures |= {f"{key}_{name}": value for key, value in there.items()}
    return figures


def churn_on(
    bench: Bench, repertoire: Repertoire, num_tasks: int, rounds: int, *, num_loaders: int = 2, forget: bool = False
) -> dict[str, object]:
    """One storage's part of it: rounds of 50 requests; ratios of all, and where 95 % lie when rounds are drawn anew.

    Every round is asked `PASSES` times each way, and of a request's times the median counts: few requests make a P99,
    and whatever else the machine does in a second would decide it. "every_time" counts all times.
    Short answers of 16 tasks, each as likely, large experts, room for half of them. Requests come at random, half as
    many a second as could be answered without guesses. "off" begins to read a set when its task is located; "demand"
    foresees nothing, see `on_demand`. "resident" has room for all: nothing can gain more than that.
    """
    budget = num_tasks * set_bytes(repertoire) // 2
    ways: dict[str, dict[str, object]] = {
        "prefetch": {"prefetch": True, "expert_budget_bytes": budget},
        "off": {"prefetch": False, "expert_budget_bytes": budget},
        "demand": {"prefetch": False, "expert_budget_bytes": budget, "on_demand": True},
        "resident": {"prefetch": False, "expert_budget_bytes": 4 * budget},
    }
    cold = repertoire if forget else None
    asked: dict[str, list[list[list[float]]]] = {name: [[] for _ in range(rounds)] for name in ways}
    with ExitStack() as open_engines:
        engines = {
            name: open_engines.enter_context(bench.serve(repertoire, num_loaders=num_loaders, **options))  # type: ignore[arg-type]
            for name, options in ways.items()
        }
        for served in engines.values():
            served.burst(range(num_tasks), width=4, num_tokens=2)
        tasks = random.Random("rate").choices(range(num_tasks), k=50)
        rate = engines["off"].burst(tasks, width=EngineOptions.max_running, num_tokens=2) / 2 / 2
        if not forget:
            into_page_cache(repertoire.root)
        before = {name: served.engine.statistics().stall_s for name, served in engines.items()}
        for turn in range(PASSES * rounds):
            number = turn % rounds
            for name in rotated([*ways], turn + turn // rounds):
                asked[name][number].append(arrivals(engines[name], num_tasks, rate, seed=number, cold=cold))
        memory = engines["prefetch"].engine.statistics().memory
        stalls = {name: served.engine.statistics().stall_s - before[name] for name, served in engines.items()}
    settled = memory.prefetch_useful_bytes + memory.prefetch_wasted_bytes
    stall_ms = {name: 1e3 * seconds / (PASSES * 50 * rounds) for name, seconds in stalls.items()}
    found = {name: [[*map(statistics.median, zip(*times, strict=True))] for times in asked[name]] for name in ways}
    every = {name: [seconds for times in asked[name] for turn in times for seconds in turn] for name in ways}

    def pooled(name: str, share: float, drawn: Sequence[int] = range(rounds)) -> float:
        return percentile([seconds for number in drawn for seconds in found[name][number]], share)

    def over(name: str, other: str, share: float, drawn: Sequence[int] = range(rounds)) -> float:
        return pooled(name, share, drawn) / pooled(other, share, drawn)

    figures: dict[str, object] = {}
    for name, other in (("prefetch", "off"), ("resident", "off"), ("prefetch", "demand"), ("resident", "demand")):
        for share in (50, 90, 99):
            figures[f"p{share}_ttft_{name}_over_{other}"] = over(name, other, share / 100)
        figures[f"mean_ttft_{name}_over_{other}"] = sum(map(sum, found[name])) / sum(map(sum, found[other]))
        ratio = partial(over, name, other, 0.99)
        figures[f"p99_ttft_{name}_over_{other}_interval"] = interval(range(rounds), ratio)
        p99, other_p99 = (percentile(every[way], 0.99) for way in (name, other))
        figures[f"p99_ttft_{name}_over_{other}_every_time"] = p99 / other_p99
    return figures | {
        **{f"p{share}_ttft_{name}_ms": 1e3 * pooled(name, share / 100) for name in ways for share in (50, 99)},
        "requests_each_way": 50 * rounds,
        "requests_per_s": rate,
        "stall_ms_per_request": stall_ms["prefetch"],
        "stall_ms_per_request_off": stall_ms["off"],
        "stall_ms_per_request_demand": stall_ms["demand"],
        "prefetch_precision": memory.prefetch_precision,
        "prefetch_recall": memory.prefetch_recall,
        "wasted_bytes_share": memory.prefetch_wasted_bytes / max(1, settled),
    }


def arrivals(served: Served, num_tasks: int, rate: float, *, seed: int, cold: Repertoire | None) -> list[float]:
    """Seconds to the first token of 50 requests that come at random, `rate` a second (Poisson).

    Nothing of a task in `cold` is in the page cache when a request for it comes.
    """
    chance = random.Random(seed)
    flying: list[Asked] = []
    due = time.perf_counter()
    for _ in range(50):
        due += chance.expovariate(rate)
        time.sleep(max(0.0, due - time.perf_counter()))
        task = chance.randrange(num_tasks)
        if cold is not None:
            drop_pages(cold, served.engine.generation.manifest, task)
        flying.append(served.ask(task, num_tokens=2))
    return [asked.first_s() for asked in flying]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def draw(curve: Sequence[dict[str, float]], path: Path) -> None:
    """Throughput over pressure."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    across = [point["working_set_over_budget"] for point in curve]
    axes.plot(
        across, [point["throughput_over_resident"] for point in curve], "o-", color="tab:green", label="throughput"
    )
    axes.plot(across, [point["hit_rate"] for point in curve], "s--", color="grey", label="hit rate")
    axes.set(xlabel="working set / expert budget", ylabel="over all resident", ylim=(0, 1.1))
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run everything, print rows, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/memory"), help="where synthetic repertoires go")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--many", type=int, default=1000, help="tasks in the large repertoire")
    parser.add_argument("--working-set", type=int, default=16, help="tasks of the traffic")
    parser.add_argument("--part", choices=["registered", "cold_and_warm", "pressure", "churn"], help="only this one")
    parser.add_argument("--child", choices=["startup"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(startup(options.folder)))
        return
    base = load_base(resolve_base("smollm2", cache=cache_folder()), dtype=torch.float32, device=torch.device("cpu"))

    def repertoire(name: str, num_tasks: int, **fields: object) -> Repertoire:
        chosen = {"rank": RANK, "locate": True, "prompt": prompt, **fields}
        return make_repertoire(options.folder / LAYOUT / name, base, num_tasks, **chosen)  # type: ignore[arg-type]

    working_set, repeats = options.working_set, options.repeats
    # All of them before the step, which takes the base's weights.
    some = repertoire("some", working_set)
    short = repertoire("short", working_set, prompt=short_prompt)
    large = repertoire("some_large", working_set, rank=LARGE_RANK)
    few, many = (repertoire(name, count, locate=False) for name, count in (("few", 5), ("many", options.many)))
    step = make_step_model(
        base.model,
        max_context=256,
        weights="float32",
        step="auto",
        folder=cache_folder() / "native",
        threads=torch.get_num_threads(),
    )
    bench = Bench(step, base)
    parts: dict[str, Callable[[], dict[str, object]]] = {
        "registered": lambda: registered(bench, few, many, repeats),
        "cold_and_warm": lambda: cold_and_warm(bench, some, short, working_set, 2 * repeats),
        "pressure": lambda: pressure(bench, some, working_set, repeats),
        "churn": lambda: churn(bench, large, working_set, repeats),
    }
    results: dict[str, object] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f} at the start",
        "vectors": ", ".join(vector_kinds()[:1]),
        "command": "python " + " ".join(sys.argv),
        "expert_set_bytes": set_bytes(some),
        "prompt_tokens": len(base.tokenizer.encode(prompt(0))),
    }
    for name, part in parts.items():
        if options.part in (None, name):
            started = time.perf_counter()
            figures = part()
            print(json.dumps({"part": name, "took_s": round(time.perf_counter() - started), **figures}), flush=True)
            results |= figures
    results["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if options.part is None:
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        write_table()
        draw(results["curve"], RESULTS.with_suffix(".png"))  # type: ignore[arg-type]
        print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
