"""Ways to mix frozen experts on composite instructions, compared: the figures of benchmarks/results/grouped.json.

Grouped routing (AT-MoE) against a flat softmax with as many parameters, the uniform mean, the best single expert and
Arrow. All see the same experts, one per intent; only the first two are trained, on the same composite rows.
Read first: `exact` is the share of answers that are right as a whole, `parts` that of their parts, in points.

    python benchmarks/grouped.py --base smollm2 --seeds 0,1,2 --train-rows 480 --test-rows 120
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from greenroom.cli.places import cache_folder
from runtime.kernels.routing import top_k_weights
from runtime.model.attach import MixtureFFN, attached
from runtime.model.base import BaseModel, load_base, resolve_base
from runtime.model.expert import Expert
from runtime.model.prompt import default_template
from runtime.model.repertoire import Repertoire
from runtime.model.router_record import Grouping
from training.answers import Question, greedy_answers, question
from training.arrow import arrow_routers
from training.batches import Row, encode_row
from training.composite_data import COMPOSITE, GROUPS, INTENTS, parts, write_composite_data
from training.config import TrainingConfig
from training.data import read_task_folder
from training.grouped import GroupedRouting, frozen_mixture, train_routings
from training.grow import add_task
from training.score import normalise

RESULTS = Path(__file__).parent / "results" / "grouped.json"
GROUP_OF = {task: group for group, tasks in GROUPS.items() for task in tasks}


class FlatRouting(nn.Module):
    """`softmax(W x + V[group] x + b[group])` over all experts: the parameters of a grouped router, one level."""

    def __init__(self, labels: Sequence[str], width: int, generator: torch.Generator) -> None:
        super().__init__()
        names = list(dict.fromkeys(labels))
        self.member = torch.tensor([names.index(label) for label in labels])
        self.weight = nn.Parameter(torch.randn(len(labels), width, generator=generator) * 0.02)
        self.group_weight = nn.Parameter(torch.randn(len(names), width, generator=generator) * 0.02)
        self.group_bias = nn.Parameter(torch.zeros(len(names)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, E]."""
        of_group = x.float() @ self.group_weight.t() + self.group_bias
        return torch.softmax(x.float() @ self.weight.t() + of_group[:, self.member], dim=1)


class ConstantRouting(nn.Module):
    """The same weights for every token."""

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.weights = torch.tensor(weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, E]."""
        return self.weights.expand(x.shape[0], -1)


class ArrowRouting(nn.Module):
    """Top-k softmax of |x . v| over the experts' prototypes."""

    def __init__(self, prototypes: torch.Tensor, top_k: int) -> None:
        super().__init__()
        self.prototypes, self.top_k = prototypes, top_k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, E]."""
        logits = (x.float() @ self.prototypes.t()).abs()
        k = torch.full((x.shape[0],), self.top_k)
        return top_k_weights(logits, torch.ones_like(logits, dtype=torch.bool), k, self.top_k)


def experts_of(base: BaseModel, data: Path, config: TrainingConfig, work: Path) -> dict[str, dict[int, Expert]]:
    """Train each intent alone; task -> its experts."""
    repertoire = Repertoire(work)
    for task in INTENTS:
        if repertoire.head() is None or task not in repertoire.manifest().task_names():
            add_task(repertoire, base, read_task_folder(data / task), config)
            print(f"{work.name}: {task} trained", file=sys.stderr)
    manifest = repertoire.manifest()
    sets = {entry.task: entry for entry in manifest.experts}
    return {
        task: {unit.layer: repertoire.read_unit(sets[task], unit, manifest.base) for unit in sets[task].units}
        for task in INTENTS
    }


def score(base: BaseModel, ffns: Mapping[int, MixtureFFN], questions: Sequence[Question]) -> dict[str, float]:
    """Exact answers and right parts, in points."""
    with attached(base.model, ffns):
        answers = greedy_answers(base, questions)
    pairs = list(zip(answers, questions, strict=True))
    exact = [normalise(answer) == normalise(asked.expected) for answer, asked in pairs]
    found = [part in parts(answer) for answer, asked in pairs for part in parts(asked.expected)]
    return {"exact": 100 * statistics.mean(exact), "parts": 100 * statistics.mean(found)}


def run_seed(
    base: BaseModel, data: Path, work: Path, config: TrainingConfig, router_config: TrainingConfig
) -> dict[str, dict[str, float]]:
    """All methods with one seed."""
    sets = experts_of(base, data, config, work)
    composite, template = read_task_folder(data / COMPOSITE), default_template(base)
    rows: list[Row] = [encode_row(base, template, e.input, e.output, max_tokens=512) for e in composite.train]
    questions = [question(base, template.encode(base.tokenizer, e.input), e) for e in composite.test]
    width = base.info.width
    grouping = Grouping(
        groups=tuple(GROUP_OF[task] for task in sets),
        scope="token",
        within="input",
        tau_group=1.0,
        tau_expert=1.0,
        epsilon=0.0,
        share=1.0,
        general=None,
    )

    def mixture(make: object) -> dict[int, MixtureFFN]:
        return frozen_mixture(base, sets, GROUP_OF, {}, make, seed=router_config.seed)  # type: ignore[arg-type]

    results = {}
    trained = {
        "grouped": lambda labels, general, generator: GroupedRouting(
            grouping, labels, width, has_general=general, generator=generator
        ),
        "flat": lambda labels, _general, generator: FlatRouting(labels, width, generator),
    }
    for name, make in trained.items():
        ffns = mixture(make)
        train_routings(base, ffns, rows, name=COMPOSITE, summaries=None, config=router_config)
        count = sum(p.numel() for ffn in ffns.values() for p in ffn.weigh.parameters())  # type: ignore[union-attr]
        results[name] = {**score(base, ffns, questions), "trained_parameters": count}
    for top_k in (1, 2):
        layers = iter(arrow_routers(sets, width).values())
        ffns = mixture(lambda _labels, _general, _generator: ArrowRouting(next(layers), top_k))  # noqa: B023
        results[f"arrow_top_{top_k}"] = {**score(base, ffns, questions), "trained_parameters": 0}
    ffns = mixture(lambda labels, _general, _generator: ConstantRouting([1 / len(labels)] * len(labels)))
    results["uniform"] = {**score(base, ffns, questions), "trained_parameters": 0}
    singles = []
    for task in sets:
        only = [float(other == task) for other in sets]
        ffns = mixture(lambda _labels, _general, _generator: ConstantRouting(only))  # noqa: B023
        singles.append(score(base, ffns, questions))
    results["best_single"] = {**max(singles, key=lambda found: found["parts"]), "trained_parameters": 0}
    return results


def main(
    *,
    base: Annotated[str, typer.Option(help="A known base, or the folder of a local one.")] = "smollm2",
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
    train_rows: Annotated[int, typer.Option(help="Rows per intent, and of composite instructions.")] = 480,
    test_rows: Annotated[int, typer.Option(help="Composite questions.")] = 120,
    epochs: Annotated[int, typer.Option(help="Passes, of experts and of routers.")] = 3,
    max_steps: Annotated[int | None, typer.Option(help="Upper bound on steps of each training.")] = None,
    work: Annotated[Path | None, typer.Option(help="Keeps data and trained experts between runs.")] = None,
    output: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS,
) -> None:
    """Compare ways to mix frozen experts on composite instructions."""
    started, folder = time.monotonic(), work or Path(tempfile.mkdtemp())
    model = load_base(resolve_base(base, cache=cache_folder()), dtype=torch.float32, device=torch.device("cpu"))
    runs = []
    for seed in (int(text) for text in seeds.split(",")):
        data = folder / f"data-{seed}"
        write_composite_data(data, num_train=train_rows, num_test=test_rows, seed=seed)
        config = TrainingConfig(seed=seed, epochs=epochs, max_steps=max_steps, visible="own")
        runs.append(run_seed(model, data, folder / f"experts-{seed}", config, config))
        print(json.dumps({"seed": seed, **runs[-1]}), flush=True)
    methods = {
        name: {
            "exact": round(statistics.mean(run[name]["exact"] for run in runs), 2),
            "parts": round(statistics.mean(run[name]["parts"] for run in runs), 2),
            "exact_spread": round(statistics.pstdev(run[name]["exact"] for run in runs), 2),
            "parts_spread": round(statistics.pstdev(run[name]["parts"] for run in runs), 2),
            "trained_parameters": int(runs[0][name]["trained_parameters"]),
        }
        for name in runs[0]
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "command": " ".join(["python", "benchmarks/grouped.py", *sys.argv[1:]]),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "base": model.info.name,
        "seeds": [int(text) for text in seeds.split(",")],
        "train_rows": train_rows,
        "test_rows": test_rows,
        "seconds": round(time.monotonic() - started, 1),
        "methods": methods,
    }
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
