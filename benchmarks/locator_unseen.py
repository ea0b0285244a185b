"""The locator on prompts of tasks that it knows and of tasks that it does not: who is located right, who is refused.

It prints JSON rows and writes a file of them. No expert is trained: a locator sees prompts only.
Read first: folders are split into tasks that are known and tasks that are not; then the two halves change places. Then
every task in turn is the only one that is not known, and at last half of all are known, drawn at random many times.
Shares are means over tasks. A prompt of a known task is right where it is located at its task, so a refused one is
wrong. A VAE sees the mean over the prompt, other densities see it in parts, each as a new repertoire would.

    python benchmarks/locator_unseen.py --data FOLDER --known a,b,c --lookalike a,b
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch

from greenroom.cli.places import cache_folder
from runtime.model.base import BaseModel, load_base, resolve_base
from runtime.model.locator import Locator, num_parts
from runtime.model.manifest import Density, Feature, LocatorEntry
from runtime.model.prompt import default_template
from training.config import TrainingConfig
from training.data import Example, read_tasks
from training.features import features
from training.locator import fit_entry, make_background, make_frame
from training.reference_prompts import reference_kinds, reference_prompts

DENSITIES: tuple[Density, ...] = ("low_rank", "gaussian", "vae")
NOBODY = "0" * 64
KIND: Feature = "residual_parts"
NUM_PARTS = num_parts(KIND)
Features = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def read_features(
    base: BaseModel, data: Path, *, train_rows: int, test_rows: int, max_tokens: int
) -> tuple[Features, torch.Tensor]:
    """Task -> features of prompts that fit it and of prompts that do not; and features of the reference prompts."""
    template, layer = default_template(base), base.info.num_layers // 3

    def drawn(rows: Sequence[Example], num: int) -> torch.Tensor:
        chosen = random.Random(0).sample(list(rows), min(num, len(rows)))
        return features(
            base, [template.encode(base.tokenizer, row.input)[:max_tokens] for row in chosen], layer, kind=KIND
        )

    found = {}
    for task in read_tasks(data):
        found[task.name] = (drawn(task.train, train_rows), drawn(task.test, test_rows))
        print(json.dumps({"read": task.name}), file=sys.stderr, flush=True)
    reference = [template.encode(base.tokenizer, text) for text in reference_prompts()]
    return found, features(base, reference, layer, kind=KIND)


class Fitted:
    """Every task's density, of one kind; a locator over any of them is put together without fitting anything again."""

    def __init__(self, seen: Features, reference: torch.Tensor, density: Density, config: TrainingConfig) -> None:
        self.density = density
        gaussian = density != "vae"
        if not gaussian:
            width = reference.shape[1] // NUM_PARTS
            seen = {task: (own[:, :width], asked[:, :width]) for task, (own, asked) in seen.items()}
            reference = reference[:, :width]
        self.seen = seen
        self.frame = make_frame(
            reference, seed=0, density=density, kinds=reference_kinds(), num_parts=NUM_PARTS if gaussian else 1
        )
        self.background = make_background(self.frame, reference, unit_length=True) if gaussian else None
        self.entries = {}
        for i, (task, (own, _)) in enumerate(seen.items()):
            entry = fit_entry(
                self.frame,
                own,
                reference,
                config,
                density=density,
                seed=i,
                background=self.background,
                unit_length=gaussian,
            )
            found = entry.calibration
            record = LocatorEntry(digest=NOBODY, mean=found.mean, sd=found.sd, threshold=found.threshold)
            self.entries[task] = (task, {**entry.tensors, "mean": entry.prototype}, record)

    def locator(self, known: Sequence[str]) -> Locator:
        """Of these tasks alone."""
        return Locator(
            self.frame,
            [self.entries[task] for task in known],
            score="raw",
            density=self.density,
            background=self.background,
            unit_length=self.background is not None,
        )


def shares(locator: Locator, seen: Features) -> dict[str, dict[str, float]]:
    """Of the prompts of each known task, who are right and who are refused; of every other task, who are refused."""
    found: dict[str, dict[str, float]] = {"right": {}, "refused": {}, "refused_unseen": {}}
    for task, (_, prompts) in seen.items():
        decisions = [decision.task for decision in locator.locate(prompts)]
        refused = decisions.count(None) / len(decisions)
        if task in locator.tasks:
            found["right"][task] = decisions.count(task) / len(decisions)
            found["refused"][task] = refused
        else:
            found["refused_unseen"][task] = refused
    return found


def row_of(fitted: Fitted, known: Sequence[str], lookalike: Sequence[str]) -> dict[str, object]:
    """One split."""
    found = shares(fitted.locator(known), fitted.seen)
    alike = [task for task in known if task in lookalike]
    return {
        "density": fitted.density,
        "known": list(known),
        "accuracy_distinct": mean([found["right"][task] for task in known if task not in alike]),
        "accuracy_lookalike": mean([found["right"][task] for task in alike]),
        "false_abstain": mean(list(found["refused"].values())),
        "abstain_recall": mean(list(found["refused_unseen"].values())),
        "unseen": {task: round(share, 3) for task, share in found["refused_unseen"].items()},
    }


def one_out(fitted: Fitted) -> dict[str, object]:
    """Every task in turn is the only one that is not known."""
    refused, false = {}, []
    for task in fitted.seen:
        found = shares(fitted.locator([other for other in fitted.seen if other != task]), fitted.seen)
        refused[task] = round(found["refused_unseen"][task], 3)
        false.append(fmean(found["refused"].values()))
    return {
        "density": fitted.density,
        "known": "all but one",
        "false_abstain": mean(false),
        "abstain_recall": mean(list(refused.values())),
        "unseen": refused,
    }


def at_random(fitted: Fitted, lookalike: Sequence[str], *, num_splits: int) -> dict[str, object]:
    """Half of all tasks are known, drawn anew for every split."""
    rng, tasks = random.Random(0), list(fitted.seen)
    rows = [row_of(fitted, rng.sample(tasks, len(tasks) // 2), lookalike) for _ in range(num_splits)]
    found: dict[str, object] = {"density": fitted.density, "known": f"{len(tasks) // 2} at random, {num_splits} times"}
    for key in ("accuracy_distinct", "accuracy_lookalike", "false_abstain", "abstain_recall"):
        found[key] = mean([float(str(row[key])) for row in rows if row[key] is not None])
    return found


def mean(values: Sequence[float]) -> float | None:
    """Rounded; None of nothing."""
    return round(fmean(values), 4) if values else None


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder of task folders")
    parser.add_argument("--known", required=True, help="names of the tasks that are known, with commas between")
    parser.add_argument("--lookalike", default="", help="those of all tasks that resemble one another")
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--densities", nargs="+", choices=DENSITIES, default=["low_rank", "vae"])
    parser.add_argument("--train-rows", type=int, default=300)
    parser.add_argument("--test-rows", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--splits", type=int, default=20, help="splits at random")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/locator_unseen.json"))
    chosen = parser.parse_args()
    started = time.monotonic()
    base = load_base(resolve_base(chosen.base, cache=cache_folder()), dtype=torch.float32, device=torch.device("cpu"))
    sizes = {name: getattr(chosen, name) for name in ("train_rows", "test_rows", "max_tokens")}
    seen, reference = read_features(base, chosen.data, **sizes)
    known, alike = chosen.known.split(","), chosen.lookalike.split(",")
    others = [task for task in seen if task not in known]
    rows = []
    for density in chosen.densities:
        fitted = Fitted(seen, reference, density, TrainingConfig())
        for made in (
            row_of(fitted, known, alike),
            row_of(fitted, others, alike),
            one_out(fitted),
            at_random(fitted, alike, num_splits=chosen.splits),
        ):
            rows.append(made)
            print(json.dumps(made), flush=True)
    result = {
        "command": " ".join(["python", *("PATH" if word == str(chosen.data) else word for word in sys.argv)]),
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
        "seconds": round(time.monotonic() - started, 1),
        "rows": rows,
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
