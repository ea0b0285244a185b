"""The engine's speed on the workloads W1-W7, beside other engines on the same machine in the same run.

It prints one JSON row per system and workload and writes benchmarks/results/engine.json.
Read first: run it on a quiet machine; rows are medians over rounds in which every system takes its turn. W1-W4, W5, and
W6 and W7 run in processes of their own, for ours as for peers, so the peak memory of a row is that of its process up to
there: its start and the smaller workloads of the same kind. The floor of a decode
step is what must be read over the bandwidth, or what must be multiplied over the peak, whichever is longer; both
limits are measured at the beginning of each run, and are medians where several runs add up.

    python benchmarks/engine.py                          # ours alone
    PEERS_ROOT=... python benchmarks/engine.py --peers FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from engine_peers import BASE, PEERS, SINGLE, run_peer

RESULTS = Path(__file__).parent / "results" / "engine.json"
HERE = Path(__file__).parent
ROUTED = ("W6", "W7")
WORKLOADS = (*SINGLE, *BASE, *ROUTED)
LIMIT_TRIES = 5
OURS = ("int8", "bfloat16", "float32", "int4")
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
BATCH = {"W1": 1, "W2": 8, "W3": 8, "W4": 16, "W5b1": 1, "W5b8": 8, "W5b16": 16, "W6": 8}
ADAPTERS = {"W1": 1, "W2": 1, "W3": 8, "W4": 16}
# SmolLM2-135M: multiply-adds per token are its matrices' weights.
LAYERS, WIDTH, FFN, HEADS, VOCABULARY = 30, 576, 1536, 15, 49152
NARROW = LAYERS * 2 * WIDTH * FFN  # gate and up, of 4 bits where these are asked for
WIDE = LAYERS * (WIDTH * 64 * HEADS + WIDTH * WIDTH + WIDTH * FFN) + VOCABULARY * WIDTH  # q, k, v, o, down and the head
CONTEXT = 96  # tokens in a sequence's cache, on average over an answer


class Child:
    """Our engine in its own process."""

    def __init__(self, weights: str, folder: Path, threads: int, step: str) -> None:
        command = [sys.executable, str(HERE / "engine_child.py"), "--weights", weights, "--folder", str(folder)]
        command += ["--threads", str(threads), "--step", step]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.start_s = float(self._answer()["start_s"])

    def say(self, line: str) -> dict[str, Any]:
        """A line, and its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the engine's process ended early; its words are above")
        found = json.loads(line)
        assert isinstance(found, dict)
        return found

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def measure_limits(threads: int) -> dict[str, float]:
    """Bandwidth and peaks of this machine, by benchmarks/limits.cpp: the best of five tries, since others disturb."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "limits"
        flags = ["-O3", "-march=native", "-std=c++20", "-pthread"]
        subprocess.run(["g++", *flags, str(HERE / "limits.cpp"), "-o", str(program)], check=True)
        run = [str(program), str(threads)]
        tries = [
            json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
            for _ in range(LIMIT_TRIES)
        ]
    return {name: max(found[name] for found in tries) for name in tries[0]}


def floor_s(workload: str, weights: str, limits: dict[str, float]) -> float:
    """Seconds that a decode step takes at least: bytes over bandwidth, or multiply-adds over peak."""
    batch = BATCH[workload]
    per_weight = {"float32": (4, 4), "bfloat16": (2, 2), "int8": (33 / 32, 33 / 32), "int4": (9 / 16, 33 / 32)}[weights]
    size = NARROW * per_weight[0] + WIDE * per_weight[1]
    half = 4 if weights == "float32" else 2
    size += batch * CONTEXT * 2 * LAYERS * 192 * half
    expert = 8 * (WIDTH * 5 + FFN * 3 + 192 * 2 + WIDTH * 2) * 2  # one layer of an adapter of rank 8 on all linears
    size += ADAPTERS.get(workload, 0) * expert * LAYERS
    if workload == "W6":
        size += 8 * 20 * 8 * (3 * WIDTH + 3 * FFN) * 2
    kind = {"int4": "int8"}.get(weights, weights)
    operations = batch * (NARROW + WIDE)
    return max(size / limits["bandwidth_gb_s"], operations / limits[f"{kind}_gmac_s"]) / 1e9


Samples = dict[tuple[str, str, int, str], list[dict[str, float]]]
"""(system, dtype, bits of a weight, workload) -> a row per round."""


def our_round(weights: str, options: argparse.Namespace, samples: Samples) -> float:
    """Our turn with one kind of weights; returns the seconds that an engine took to start."""
    start_s = 0.0
    for together in (SINGLE, BASE, ROUTED):
        wanted = [workload for workload in options.workloads if workload in together]
        if not wanted:
            continue
        child = Child(weights, options.folder, options.threads, "native")
        for workload in wanted:
            if workload != "W7":
                child.say(f"warm {workload}")
            row = child.say(workload)
            samples["greenroom", weights, BITS[weights], workload].append(row)
            _show("greenroom", weights, workload, row)
        child.close()
        start_s = child.start_s
    return start_s


def check_tokens(weights: str, options: argparse.Namespace) -> dict[str, int]:
    """Workload -> how many greedy tokens were compared between each sequence alone and in its batch; all are equal."""
    child, checked = Child(weights, options.folder, options.threads, "native"), {}
    for workload in sorted({"W3", "W4"}.intersection(options.workloads)):
        tokens = child.say(f"tokens {workload}")
        if tokens["together"] != tokens["alone"]:
            raise SystemExit(f"{weights} {workload}: a batch changed an answer")
        checked[workload] = sum(len(each) for each in tokens["alone"])
    child.close()
    return checked


def peers_round(options: argparse.Namespace, samples: Samples) -> None:
    """The turns of the peers."""
    for peer in PEERS:
        if options.only and peer.system not in options.only:
            continue
        root = Path(os.environ["PEERS_ROOT"])
        for row in run_peer(peer, options.peers, root, workloads=options.workloads, threads=options.threads):
            samples[peer.system, peer.dtype, peer.weight_bits, row["workload"]].append(row)
            _show(peer.system, peer.dtype, row["workload"], row)


def rounds(
    options: argparse.Namespace, limits: dict[str, float]
) -> tuple[list[dict[str, Any]], dict[str, float], list[dict[str, float]]]:
    """Rows of all systems, medians over the rounds; how long our engines took to start; and each run's limits."""
    samples: Samples = defaultdict(list)
    starts: dict[str, float] = {}
    kept = options.folder / "rounds.json"
    checked: dict[str, dict[str, int]] = {}
    tries: list[dict[str, float]] = []
    if options.more and kept.is_file():
        earlier = json.loads(kept.read_text(encoding="utf-8"))
        checked, starts, tries = earlier["checked"], earlier["starts"], earlier["limits"]
        for *key, found in earlier["rounds"]:
            samples[key[0], key[1], key[2], key[3]] = found
    if options.repeats or not tries:
        tries.append(limits)
    for weights in options.weights:
        checked[weights] = checked.get(weights) or check_tokens(weights, options)
    for _ in range(options.repeats):
        for weights in options.weights if not options.only or "greenroom" in options.only else ():
            starts[weights] = our_round(weights, options, samples)
        if options.peers:
            peers_round(options, samples)
        found_all = [[*key, found] for key, found in samples.items()]
        done = {"checked": checked, "starts": starts, "limits": tries, "rounds": found_all}
        kept.write_text(json.dumps(done), encoding="utf-8")
    rows = []
    for (system, dtype, bits, workload), found in samples.items():
        row: dict[str, Any] = {"workload": workload, "system": system, "dtype": dtype, "weight_bits": bits}
        for name in ("tokens_per_s", "ttft_s", "tpot_s"):
            row[name] = float(f"{statistics.median(each[name] for each in found):.4g}")
        row["peak_rss_mb"] = round(max(each["peak_rss_mb"] for each in found))
        row["spread"] = [round(each["tokens_per_s"], 1) for each in found]
        row["tokens_checked"] = checked.get(dtype, {}).get(workload) if system == "greenroom" else None
        rows.append(row)
    return rows, starts, tries


def _show(system: str, dtype: str, workload: str, row: dict[str, float]) -> None:
    print(
        f"{system} {dtype} {workload} {row['tokens_per_s']:.1f} tokens/s, first {row['ttft_s']:.3f} s",
        flush=True,
    )


def judge(rows: list[dict[str, Any]], floors: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Ratios between rows of this run; a ratio whose rows are missing is left out."""
    speed = {(row["system"], row["dtype"], row["workload"]): row["tokens_per_s"] for row in rows}
    ours = {
        workload: value
        for (system, dtype, workload), value in speed.items()
        if (system, dtype) == ("greenroom", "int8")
    }

    def best(workload: str, max_bits: int = 32, min_bits: int = 0) -> float | None:
        found = [
            row["tokens_per_s"]
            for row in rows
            if row["workload"] == workload
            and row["system"] != "greenroom"
            and min_bits <= row["weight_bits"] <= max_bits
        ]
        return max(found, default=None)

    ratios: dict[str, float | None] = {}
    for workload in WORKLOADS:
        peer = best(workload)
        if workload in ours and peer:
            ratios[f"{workload}_over_best_peer"] = ours[workload] / peer
        exact = best(workload, min_bits=8)
        if workload in ours and exact:
            ratios[f"{workload}_over_best_peer_of_8_bits_or_more"] = ours[workload] / exact
    for workload, plain in (("W3", "W5b8"), ("W4", "W5b16"), ("W6", "W5b8")):
        if workload in ours and plain in ours:
            ratios[f"{workload}_over_{plain}"] = ours[workload] / ours[plain]
    for row in rows:
        alike = [
            each["peak_rss_mb"]
            for each in rows
            if each["system"] != "greenroom"
            and each["workload"] == row["workload"]
            and each["weight_bits"] == row["weight_bits"]
        ]
        if row["system"] == "greenroom" and alike:
            name = f"{row['workload']}_{row['dtype']}_memory_over_leanest_peer"
            ratios[name] = row["peak_rss_mb"] / min(alike)
        floor = floors.get(row["dtype"], {}).get(row["workload"])
        if row["system"] == "greenroom" and floor:
            ratios[f"{row['workload']}_{row['dtype']}_step_over_floor"] = row["tpot_s"] / floor
    return {name: round(value, 2) for name, value in ratios.items() if value is not None}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder of the peers' scripts; PEERS_ROOT names their environments")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workloads", type=lambda text: tuple(text.split(",")), default=WORKLOADS)
    parser.add_argument("--weights", type=lambda text: tuple(text.split(",")), default=OURS)
    parser.add_argument("--only", type=lambda text: tuple(text.split(",")), default=(), help="systems that take turns")
    parser.add_argument("--more", action="store_true", help="add to the rounds of an earlier run in the same folder")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, default=Path("build/engine"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    started = time.perf_counter()
    rows, starts, tries = rounds(options, measure_limits(options.threads))
    limits = {name: statistics.median(each[name] for each in tries) for name in tries[0]}
    print(json.dumps(limits), flush=True)
    floors = {
        weights: {name: floor_s(name, weights, limits) for name in options.workloads if name in BATCH}
        for weights in options.weights
    }
    words = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":")[1].strip() for line in words if "model name" in line), "")
    profiles = {}
    child = Child("int8", options.folder, options.threads, "native")
    starts["int8"] = child.start_s
    for workload in sorted({"W2", "W3", "W5b8", "W6"}.intersection(options.workloads)):
        child.say(f"warm {workload}")
        found = child.say(f"profile {workload}")
        profiles[workload] = {name: round(value, 3) for name, value in found.items()}
    child.close()
    result = {
        "machine": {"cpu": cpu, "threads": options.threads, "python": platform.python_version()},
        "command": "python benchmarks/engine.py"
        + (" --peers FOLDER" if any(row["system"] != "greenroom" for row in rows) else ""),
        "seconds": round(time.perf_counter() - started),
        "bandwidth_gb_s": limits["bandwidth_gb_s"],
        "limits": limits,
        "bandwidth_spread": sorted(each["bandwidth_gb_s"] for each in tries),
        "start_s": starts,
        "floor": floors,
        "int8_profile_ms_per_step": profiles,
        "ratios": judge(rows, floors),
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["ratios"], indent=1))


if __name__ == "__main__":
    main()
