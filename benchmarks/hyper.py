"""HyperMoE against what could stand in its place, at equal trained parameters: benchmarks/results/hyper.json.

Every method trains a new expert and router on a target task on top of frozen experts of older tasks, with the same
rows, steps and rates, and beside them: nothing (`no_hyper`), a wider expert (`wider_expert`), one adapter per layer
(`static_adapter`), one per expert and layer (`free_adapters`), or HyperMoE's (`hyper`).
Read first: it is resumable; what is finished lies in `--work`. A negative result is a result.

    python benchmarks/hyper.py --data FOLDER --tasks a,b,c --targets d,e --seeds 0,1,2
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from greenroom.cli.evaluate import made_by
from greenroom.cli.places import cache_folder
from runtime.kernels.freed_memory import keep_freed_memory
from runtime.model.attach import attached
from runtime.model.base import BaseModel, load_base, resolve_base
from runtime.model.expert import Expert
from runtime.model.generation import base_ref
from runtime.model.prompt import default_template
from runtime.model.repertoire import Repertoire
from training.adapters_beside import attach_adapters
from training.answer_book import write_json
from training.answers import greedy_answers
from training.batches import Row, encode_row
from training.config import TrainingConfig
from training.grow import add_task
from training.held_out import held_out_loss
from training.hyper import attach_hyper
from training.metrics import spread
from training.mixtures import fresh_experts, new_mixture
from training.precision import base_dtype
from training.score import exact_match
from training.seeds import seed_for
from training.subject import Subject, check_tasks, read_subject
from training.task import train_mixture

RESULTS = Path(__file__).parent / "results" / "hyper.json"
METHODS = ("no_hyper", "wider_expert", "static_adapter", "free_adapters", "hyper")


@dataclass(frozen=True)
class Bench:
    """What all methods share: the base, the folder of the data, the older experts and the sizes."""

    base: BaseModel
    data: Path
    older: Sequence[Mapping[int, Expert]]
    first_layer: int
    train_rows: int
    test_rows: int

    def subject(self, name: str, config: TrainingConfig) -> Subject:
        """Rows and questions of a target."""
        sizes = {"train_rows": self.train_rows, "test_rows": self.test_rows}
        return read_subject(self.base, self.data / name, config=config, **sizes)


def older_experts(base: BaseModel, data: Path, tasks: Sequence[str], root: Path, config: TrainingConfig) -> list[Any]:
    """One LoRA per older task, each trained alone; a repertoire in `root` keeps them."""
    repertoire, alone = Repertoire(root), replace(config, visible="own", hyper_bottleneck=None)
    for name in tasks:
        if repertoire.head() is None or name not in repertoire.manifest().task_names():
            subject = read_subject(base, data / name, train_rows=800, test_rows=1, config=alone)
            add_task(repertoire, base, subject.data, alone)
    ref = base_ref(base.info)
    entries = repertoire.manifest().experts
    return [{unit.layer: repertoire.read_unit(entry, unit, ref) for unit in entry.units} for entry in entries]


def measure(bench: Bench, method: str, subject: Subject, config: TrainingConfig) -> dict[str, float]:
    """Train one method on one target with one seed; held-out loss in nats, exact match in points, parameters."""
    base, layers = bench.base, range(bench.first_layer, bench.base.info.num_layers)
    beside_of_hyper = _parameters_of_hyper(bench, subject, config)
    plain = replace(config, hyper_bottleneck=config.hyper_bottleneck if method == "hyper" else None)
    if method == "wider_expert":
        probe = fresh_experts(base, layers, plain, seed_name=subject.name)
        per_rank = sum(expert.num_parameters for expert in probe.values()) / plain.rank
        extra = max(1, round(beside_of_hyper / per_rank))
        # alpha grows with the rank, so that the scale of the update stays.
        plain = replace(plain, rank=plain.rank + extra, alpha=plain.alpha * (plain.rank + extra) / plain.rank)
    new = fresh_experts(base, layers, plain, seed_name=subject.name)
    ffns = new_mixture(base, bench.older, new, name=subject.name, first_layer=bench.first_layer, config=plain)
    if method in ("static_adapter", "free_adapters"):
        generator = torch.Generator().manual_seed(seed_for(config.seed, subject.name, method))
        attach_adapters(
            ffns,
            per_expert=method == "free_adapters",
            parameters=beside_of_hyper,
            width=base.info.width,
            generator=generator,
        )
    attach_hyper(base, ffns, name=subject.name, config=plain)
    trained = {id(p): p.numel() for ffn in ffns.values() for p in ffn.parameters() if p.requires_grad}
    train_mixture(base, ffns, subject.rows, name=subject.name, config=plain)
    loss, _ = held_out_loss(base, ffns, _test_rows(base, subject, config), batch_size=config.batch_size)
    with attached(base.model, ffns):
        answers = greedy_answers(base, subject.questions)
    return {
        "loss": loss,
        "exact_match": 100 * exact_match(answers, [question.expected for question in subject.questions]),
        "trained_parameters": sum(trained.values()),
    }


def _parameters_of_hyper(bench: Bench, subject: Subject, config: TrainingConfig) -> int:
    new = fresh_experts(bench.base, [bench.first_layer], config, seed_name=subject.name)
    layers = range(bench.first_layer, bench.base.info.num_layers)
    every = {layer: replace(new[bench.first_layer], layer=layer) for layer in layers}
    ffns = new_mixture(bench.base, bench.older, every, name=subject.name, first_layer=bench.first_layer, config=config)
    network = attach_hyper(bench.base, ffns, name=subject.name, config=config)
    assert network is not None, "the benchmark asks for a bottleneck"
    return sum(parameter.numel() for parameter in network.parameters())


def _test_rows(base: BaseModel, subject: Subject, config: TrainingConfig) -> list[Row]:
    template = default_template(base)
    return [
        encode_row(base, template, row.input, row.output, max_tokens=config.max_tokens) for row in subject.data.test
    ]


def summary(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Method -> means over seeds and targets, with the deviation over seeds of the mean over targets."""
    found = {}
    for method, runs in rows.items():
        seeds = sorted({int(run["seed"]) for run in runs})
        entry: dict[str, Any] = {}
        for key in ("exact_match", "loss", "trained_parameters"):
            means = [_mean([run[key] for run in runs if run["seed"] == seed]) for seed in seeds]
            entry |= {key: round(_mean(means), 4), f"{key}_sd": round(spread(means), 4)}
        entry["trained_parameters"] = round(entry["trained_parameters"])
        del entry["trained_parameters_sd"]
        found[method] = entry | {"runs": list(runs)}
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    """Run what is missing, print rows, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of task folders")
    parser.add_argument("--tasks", required=True, help="older tasks, whose experts are frozen: a,b,c")
    parser.add_argument("--targets", required=True, help="tasks to learn on top: d,e")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--train-rows", type=int, default=800)
    parser.add_argument("--test-rows", type=int, default=100)
    parser.add_argument("--max-steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--bottleneck", type=int, default=16)
    parser.add_argument("--factor", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build") / "hyper")
    parser.add_argument("--output", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    tasks, targets = chosen.tasks.split(","), chosen.targets.split(",")
    keep_freed_memory()
    check_tasks(chosen.data, "tasks", [*tasks, *targets])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = resolve_base(chosen.base, cache=cache_folder())
    base = load_base(folder, dtype=base_dtype("auto", device), device=device)
    config = TrainingConfig(
        first_layer=base.info.num_layers // 3,
        rank=chosen.rank,
        batch_size=chosen.batch_size,
        max_steps=chosen.max_steps,
        epochs=chosen.max_steps,
        hyper_bottleneck=chosen.bottleneck,
        hyper_factor=chosen.factor,
    )
    settings = {key: value for key, value in vars(chosen).items() if not isinstance(value, Path)}
    settings = {key: value for key, value in settings.items() if key not in ("seeds", "targets", "base")}
    work = chosen.work / seed_name(settings)
    older = older_experts(base, chosen.data, tasks, work / "older", config)
    bench = Bench(base, chosen.data, older, base.info.num_layers // 3, chosen.train_rows, chosen.test_rows)
    rows: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    seeds = [int(word) for word in chosen.seeds.split(",")]
    for seed in seeds:
        seeded = replace(config, seed=seed)
        for target in targets:
            subject = bench.subject(target, seeded)
            for method in METHODS:
                path = work / f"{target}-{seed}-{method}.json"
                if not path.exists():
                    write_json(path, {"target": target, "seed": seed, **measure(bench, method, subject, seeded)})
                rows[method].append(json.loads(path.read_text(encoding="utf-8")))
                print(json.dumps({"method": method, **rows[method][-1]}), flush=True)
    origin = made_by(base.info.name, str(base.model.dtype), device.type)
    result = origin | {"seeds": seeds, "tasks": tasks, "targets": targets, "settings": settings}
    write_json(chosen.output, result | {"methods": summary(rows)})


def seed_name(settings: Mapping[str, Any]) -> str:
    """A folder's name for settings: other settings never share what is kept."""
    return f"{seed_for(0, json.dumps(settings, sort_keys=True)):012x}"


if __name__ == "__main__":
    main()
