"""The locator with many tasks, measured: milliseconds and megabytes per decision, with and without the pre-filter.

It prints JSON rows and writes benchmarks/results/locator.json. Densities are fitted to real features of a few task
folders, or of the demo's tasks; thousands more are those, resampled and perturbed: a task's features are drawn from a
real task's, moved by a share of the distance between two real tasks.
Read first: run it on a quiet machine; one decision is of one prompt, as serving asks.

    python benchmarks/locator.py --tasks 1000 10000
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from greenroom.cli.places import cache_folder
from runtime.model.base import load_base, resolve_base
from runtime.model.density import density_shapes
from runtime.model.locator import NEAREST, Locator, num_parts, project
from runtime.model.manifest import Density, Feature, LocatorEntry
from runtime.model.prompt import default_template
from training.config import TrainingConfig
from training.data import read_tasks
from training.demo_data import write_demo_data
from training.features import features
from training.locator import fit_entry, low_rank_gaussian, make_background, make_frame
from training.reference_prompts import reference_kinds, reference_prompts

DENSITIES: tuple[Density, ...] = ("low_rank", "gaussian", "vae")
NOISE = "0" * 64
KIND: Feature = "residual_parts"
NUM_PARTS = num_parts(KIND)


def real_features(base_name: str, data: Path | None, *, per_task: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Features [B, 3 D] of each task, and of the reference prompts, in parts as a new repertoire has them."""
    folder = resolve_base(base_name, cache=cache_folder())
    base = load_base(folder, dtype=torch.float32, device=torch.device("cpu"))
    template, layer = default_template(base), base.info.num_layers // 3
    with tempfile.TemporaryDirectory() as scratch:
        if data is None:
            data = Path(scratch) / "demo"
            write_demo_data(data)
        tasks = read_tasks(data)
    own = [
        features(base, [template.encode(base.tokenizer, row.input) for row in task.train[:per_task]], layer, kind=KIND)
        for task in tasks
    ]
    reference = [template.encode(base.tokenizer, text) for text in reference_prompts()]
    return own, features(base, reference, layer, kind=KIND)


def simulated(own: list[torch.Tensor], num_tasks: int, *, per_task: int) -> Iterator[torch.Tensor]:
    """Features of `num_tasks` tasks: resampled from a real one, moved towards and beyond another, with noise."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.cat(own).std(0)
    for task in range(num_tasks):
        source = own[task % len(own)]
        other = own[int(torch.randint(len(own), (1,), generator=generator))]
        rows = source[torch.randint(len(source), (per_task,), generator=generator)]
        move = (other.mean(0) - source.mean(0)) * torch.randn(1, generator=generator)
        shift = 0.5 * spread * torch.randn(source.shape[1], generator=generator)
        yield rows + move + shift + 0.1 * spread * torch.randn(rows.shape, generator=generator)


def locator_of(
    simulation: Iterable[torch.Tensor], reference: torch.Tensor, density: Density, *, fitted: int
) -> tuple[Locator, list[torch.Tensor]]:
    """A locator over all tasks, and held-out features of each; only `fitted` VAEs are trained, the rest perturbed."""
    config = replace(TrainingConfig(), locator_steps=200)
    if density != "vae":
        return _gaussian_locator(simulation, reference, density)
    width = reference.shape[1] // NUM_PARTS  # a VAE sees the first part
    tasks, reference = [rows[:, :width].clone() for rows in simulation], reference[:, :width]
    frame = make_frame(reference, seed=0, density=density)
    trained = [
        fit_entry(frame, rows[:-4], reference, config, density=density, seed=i) for i, rows in enumerate(tasks[:fitted])
    ]
    generator = torch.Generator().manual_seed(1)
    entries = []
    for i, rows in enumerate(tasks):
        entry = trained[i % len(trained)]
        tensors = dict(entry.tensors)
        if i >= len(trained):
            own = ((rows.mean(0) - frame["mean"]) / frame["deviation"]) @ frame["projection"]
            tensors = {
                name: t + 0.02 * t.std() * torch.randn(t.shape, generator=generator) for name, t in tensors.items()
            }
            tensors["output.bias"] = tensors["output.bias"] + own - entry.prototype
            tensors["mean"] = own
        else:
            tensors["mean"] = entry.prototype
        found = entry.calibration
        record = LocatorEntry(digest=NOISE, mean=found.mean, sd=found.sd, threshold=found.threshold)
        entries.append((f"task-{i}", tensors, record))
    return Locator(frame, entries, score="raw", density=density), [rows[-4:] for rows in tasks]


def _gaussian_locator(
    tasks: Iterable[torch.Tensor], reference: torch.Tensor, density: Density
) -> tuple[Locator, list[torch.Tensor]]:
    """All tasks fitted, none calibrated: the task is decided by the errors alone."""
    frame = make_frame(reference, seed=0, density=density, kinds=reference_kinds(), num_parts=NUM_PARTS)
    record = LocatorEntry(digest=NOISE, mean=0.0, sd=1.0, threshold=1e9)
    entries, held_out = [], []
    for i, rows in enumerate(tasks):
        held_out.append(rows[-4:].clone())
        seen = project(frame, rows[:-4], unit_length=True)
        tensors = low_rank_gaussian(seen) if density == "low_rank" else {"mean": seen.mean(0)}
        entries.append((f"task-{i}", tensors, record))
    background = make_background(frame, reference, unit_length=True)
    locator = Locator(frame, entries, score="raw", density=density, background=background, unit_length=True)
    return locator, held_out


def decision_ms(locator: Locator, prompts: torch.Tensor) -> float:
    """Median milliseconds of one decision for one prompt, after a few to warm up."""
    times = []
    for i, row in enumerate(prompts):
        started = time.perf_counter()
        locator.locate(row.unsqueeze(0))
        if i >= 5:
            times.append((time.perf_counter() - started) * 1000)
    return statistics.median(times)


def row_of(locator: Locator, held_out: list[torch.Tensor], *, repeats: int) -> dict[str, object]:
    """Times, sizes, and how often the pre-filter keeps the task that all densities together would choose."""
    num_tasks = len(locator.tasks)
    chosen = torch.linspace(0, num_tasks - 1, repeats + 5).long().tolist()
    prompts = torch.stack([held_out[i][k % 4] for k, i in enumerate(chosen)])
    all_asked = replace_nearest(locator, num_tasks)
    kept = right = right_all = 0
    for i, row in zip(chosen, prompts, strict=True):
        errors = all_asked.errors(row.unsqueeze(0))[0]
        best = int(errors.argmin())
        asked = locator.candidates(row.unsqueeze(0))[0].tolist()
        kept += best in asked
        right_all += best == i
        right += asked[int(errors[asked].argmin())] == i
    numbers = sum(torch.Size(shape).numel() for shape in density_shapes(locator.density, locator.width).values())
    size = 4 if locator.density == "vae" else 2  # bytes of a number
    return {
        "density": locator.density,
        "num_tasks": num_tasks,
        "ms_per_decision": round(decision_ms(locator, prompts), 3),
        "ms_per_decision_without_prefilter": round(decision_ms(all_asked, prompts), 3),
        "megabytes": round(size * num_tasks * numbers / 1e6, 1),
        "megabytes_touched": round((size * min(NEAREST, num_tasks) * numbers + 4 * num_tasks * locator.width) / 1e6, 2),
        "prefilter_recall": kept / len(chosen),
        "located_right": right / len(chosen),
        "located_right_without_prefilter": right_all / len(chosen),
    }


def replace_nearest(locator: Locator, nearest: int) -> Locator:
    """The same locator with another bound on the densities that run; shares its memory."""
    other = locator.scored_by(locator.score)
    other.nearest = nearest
    return other


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--data", type=Path, help="folder of task folders; default: the demo's tasks")
    parser.add_argument("--densities", nargs="+", choices=DENSITIES, default=list(DENSITIES))
    parser.add_argument("--per-task", type=int, default=64)
    parser.add_argument("--fitted", type=int, default=32, help="VAEs that are trained; all others are perturbed copies")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/locator.json"))
    chosen = parser.parse_args()
    own, reference = real_features(chosen.base, chosen.data, per_task=chosen.per_task)
    rows = []
    for num_tasks in chosen.tasks:
        for density in chosen.densities:
            locator, held_out = locator_of(
                simulated(own, num_tasks, per_task=chosen.per_task),
                reference,
                density,
                fitted=min(chosen.fitted, num_tasks),
            )
            rows.append(row_of(locator, held_out, repeats=chosen.repeats))
            print(json.dumps(rows[-1]), flush=True)
            del locator
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "nearest": NEAREST,
        "rows": rows,
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
