"""The native decode step alone, without an engine: its milliseconds by phases, with experts and without.

It knows nothing of requests; weights and experts are random, sizes are those of SmolLM2-135M.
Read first: the arrangements take turns step by step, so that whatever disturbs the machine disturbs all of them; the
mean of the fastest fifth is told. Between two steps of an arrangement others have read far more than the caches hold,
so experts come from memory as they do in service.

    python benchmarks/native_step.py --threads 2
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

import torch

from greenroom.cli.places import cache_folder
from runtime.kernels.native_build import build
from runtime.kernels.native_mixture import NativeColumn, NativeMixture, NativePart, NativeStage
from runtime.kernels.native_step import NativeStep, StepShape

WIDTH, FFN, HEADS, KV_HEADS, HEAD_WIDTH, LAYERS, CONTEXT = 576, 1536, 9, 3, 64, 30, 256
SHAPE = StepShape(
    layers=LAYERS,
    width=WIDTH,
    ffn=FFN,
    heads=HEADS,
    kv_heads=KV_HEADS,
    head_width=HEAD_WIDTH,
    vocabulary=49152,
    context=CONTEXT,
    epsilon=1e-5,
)
LINEARS = {
    "q": (WIDTH, WIDTH),
    "k": (WIDTH, KV_HEADS * HEAD_WIDTH),
    "v": (WIDTH, KV_HEADS * HEAD_WIDTH),
    "o": (WIDTH, WIDTH),
    "gate": (WIDTH, FFN),
    "up": (WIDTH, FFN),
    "down": (FFN, WIDTH),
}
POSITION = 96  # of the new token of every sequence


def make_step(weights: str, threads: int) -> NativeStep:
    """A model of random weights, with a cache for 16 sequences."""
    step = NativeStep(build(cache_folder() / "native"), SHAPE, weights=weights, threads=threads)  # type: ignore[arg-type]
    qkv = (HEADS + 2 * KV_HEADS) * HEAD_WIDTH
    matrices = {"qkv": (qkv, WIDTH), "out": (WIDTH, WIDTH), "gate_up": (2 * FFN, WIDTH), "down": (WIDTH, FFN)}
    for layer in range(LAYERS):
        for name, (rows, cols) in matrices.items():
            step.set(name, layer, torch.randn(rows, cols) * 0.03)
        for name in ("attention_norm", "ffn_norm"):
            step.set(name, layer, torch.ones(WIDTH))
    for name in ("cos", "sin"):
        step.set(name, 0, torch.rand(CONTEXT * HEAD_WIDTH))
    dtype = torch.float32 if weights == "float32" else torch.bfloat16
    step.set_cache(*(torch.randn(LAYERS, 16, KV_HEADS, CONTEXT, HEAD_WIDTH).to(dtype) for _ in range(2)))
    return step


def make_mixture(rank: int) -> NativeMixture:
    """One bfloat16 expert on all linears of every layer."""
    mixture = NativeMixture(LAYERS)
    for layer in range(LAYERS):
        updates = {
            target: (torch.randn(rank, wide).bfloat16() * 0.1, torch.randn(rank, narrow).bfloat16() * 0.1)
            for target, (wide, narrow) in LINEARS.items()
        }
        mixture.set_layer(
            layer, [NativePart("top_k", 1, torch.zeros(1, WIDTH))], [NativeColumn.of_tensors(updates, 2.0)]
        )
    return mixture


def one_step(step: NativeStep, batch: int, mixtures: list[NativeMixture]) -> tuple[float, dict[str, float]]:
    """Milliseconds of one decode step of `batch` sequences, and of its phases; no mixtures are the base alone."""
    rows = torch.tensor([1 + i % len(mixtures) for i in range(batch)], dtype=torch.int32) if mixtures else None
    stage = NativeStage([None, *mixtures]) if mixtures else None
    hidden, slots = torch.randn(batch, WIDTH), torch.arange(batch, dtype=torch.int32)
    step.phases()
    start = time.perf_counter()
    positions = torch.full((batch,), POSITION, dtype=torch.int32)
    step.run_layers(hidden, range(LAYERS), positions, slots, stage=stage, rows=rows, alone=True)
    wall = time.perf_counter() - start
    return 1e3 * wall, {name: 1e3 * seconds for name, seconds in step.phases().items()}


def main() -> None:
    """Measure and print one JSON object per arrangement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    step = make_step(options.weights, options.threads)
    mixtures = [make_mixture(options.rank) for _ in range(16)]
    arrangements: dict[str, tuple[int, list[NativeMixture]]] = {
        "8 sequences": (8, []),
        "8 sequences, one expert set": (8, mixtures[:1]),
        "8 sequences, 8 expert sets": (8, mixtures[:8]),
        "16 sequences": (16, []),
        "16 sequences, 16 expert sets": (16, mixtures),
    }
    found: dict[str, list[tuple[float, dict[str, float]]]] = {name: [] for name in arrangements}
    for _ in range(options.repeats):
        for name, (batch, used) in arrangements.items():
            found[name].append(one_step(step, batch, used))
    for name, steps in found.items():
        best = sorted(steps, key=lambda one: one[0])[: max(1, len(steps) // 5)]
        phases = {phase: round(statistics.mean(one[1][phase] for one in best), 3) for phase in best[0][1]}
        row = {"arrangement": name, "step_ms": round(statistics.mean(one[0] for one in best), 3), "phases_ms": phases}
        print(json.dumps(row), flush=True)
    step.close()


if __name__ == "__main__":
    main()
