"""How well the locator tells tasks apart: confusion matrices over prompts that trained nothing, for each score.

It does not know how prompts are answered.
Read first: a row is a task's own prompts, a column what they were located as; the last column is "none". Every score
is tried on the same densities, so the matrices say what the choice of a score alone does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.model.base import BaseModel
from runtime.model.durable import write_durably
from runtime.model.generation import Generation
from runtime.model.locator import Locator
from runtime.model.manifest import Score
from training.features import features
from training.pictures import new_figure

ALL_SCORES: tuple[Score, ...] = ("raw", "z", "abs_z", "neg_elbo")


@dataclass(frozen=True)
class Confusion:
    """Where prompts of each task were located.

    Args:
        score: how tasks were compared.
        tasks: N names, in the order of rows and columns.
        counts: N rows of N + 1 numbers of prompts; the last is of those located nowhere.
        median_margin: of all prompts, the score of the second best task minus that of the best.
    """

    score: Score
    tasks: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    median_margin: float

    @property
    def accuracy(self) -> float:
        """Share of prompts located at their own task; 0 where there are none."""
        total = sum(map(sum, self.counts))
        return sum(row[i] for i, row in enumerate(self.counts)) / total if total else 0.0

    @property
    def abstained(self) -> float:
        """Share of prompts located nowhere; 0 where there are none."""
        total = sum(map(sum, self.counts))
        return sum(row[-1] for row in self.counts) / total if total else 0.0


def confuse(locator: Locator, seen: Mapping[str, torch.Tensor]) -> Confusion:
    """Locate features of known tasks.

    Args:
        locator: with its score.
        seen: task -> [B, D] features of its prompts; a task that the locator does not know is passed over.
    """
    columns = {task: i for i, task in enumerate(locator.tasks)}
    counts, margins = [], []
    for task in locator.tasks:
        row = [0] * (len(columns) + 1)
        if task in seen:
            for decision in locator.locate(seen[task]):
                row[len(columns) if decision.task is None else columns[decision.task]] += 1
                margins.append(decision.margin)
        counts.append(tuple(row))
    middle = float(torch.tensor(margins).median()) if margins else 0.0
    return Confusion(locator.score, locator.tasks, tuple(counts), middle)


def measure_confusion(
    generation: Generation, base: BaseModel, texts: Mapping[str, Sequence[str]]
) -> tuple[Confusion, ...]:
    """Confusion of a generation's locator for every score that its densities allow, its own score first.

    Args:
        generation: opened.
        base: the frozen base, without a mixture.
        texts: task -> inputs that did not train it.
    """
    ref, own = generation.manifest.locator, generation.locator
    seen = {}
    for task, inputs in texts.items():
        prompts = [generation.template.encode(base.tokenizer, text) for text in inputs]
        seen[task] = features(base, prompts, ref.layer, kind=ref.feature)
    possible = [score for score in ALL_SCORES if score != "neg_elbo" or ref.density == "vae"]
    possible.sort(key=lambda score: score != own.score)
    return tuple(confuse(own.scored_by(score), seen) for score in possible)


def write_confusion(file: Path, found: Sequence[Confusion]) -> None:
    """Write matrices and their shares as JSON."""
    rows = [
        {
            "score": each.score,
            "accuracy": each.accuracy,
            "abstained": each.abstained,
            "median_margin": each.median_margin,
            "tasks": each.tasks,
            "counts": each.counts,
        }
        for each in found
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_durably(file, json.dumps(rows, indent=2).encode() + b"\n", kind="confusion")


def draw_confusion(found: Sequence[Confusion], file: Path) -> None:
    """The matrices side by side, each row as shares of its task's prompts.

    Raises:
        InvalidInputError: matplotlib is not installed.
    """
    size = 1.5 + 0.35 * max((len(each.tasks) for each in found), default=1)
    figure = new_figure(max(1, len(found)) * (size + 0.5), size + 1.0, file=file)
    for axes, each in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        shares = [[count / max(1, sum(row)) for count in row] for row in each.counts]
        axes.imshow(shares, cmap="viridis", vmin=0.0, vmax=1.0)
        axes.set_xticks(range(len(each.tasks) + 1), [*each.tasks, "none"], rotation=90, fontsize=7)
        axes.set_yticks(range(len(each.tasks)), each.tasks, fontsize=7)
        axes.set_title(f"{each.score}: {each.accuracy:.1%} right, {each.abstained:.1%} none", fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
