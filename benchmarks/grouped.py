"""Ways to mix frozen experts on composite instructions, compared: the figures of benchmarks/results/grouped.json.

Grouped routing (AT-MoE) against a flat softmax with as many parameters, weights that are learned per layer and the
same for every token (`static`), the uniform mean, the best single expert and Arrow. All see the same experts, one per
intent, trained once; only the first three are trained, on the same composite rows at the same rate, and seeds vary
where their routers begin and the order of the rows. `told` is no way to mix: every part is answered by its own expert
alone after the right parts before it, which is what the experts could give.
Read first: `exact` is the share of answers that are right as a whole, `parts` that of their parts, in points;
`unseen_exact` and `unseen_parts` are of questions with pairs of intents that met in no training row. It is resumable;
what is finished lies in `--work`.

    python benchmarks/grouped.py --base smollm2 --seeds 0,1,2 --train-rows 480 --test-rows 120
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from greenroom.cli.evaluate import made_by
from greenroom.cli.places import cache_folder
from runtime.kernels.freed_memory import keep_freed_memory
from runtime.kernels.routing import top_k_weights
from runtime.model.attach import MixtureFFN, attached
from runtime.model.base import BaseModel, load_base, resolve_base
from runtime.model.expert import Expert
from runtime.model.prompt import PromptTemplate, default_template
from runtime.model.repertoire import Repertoire
from runtime.model.router_record import Grouping
from training.answer_book import write_json
from training.answers import Question, greedy_answers, question
from training.arrow import arrow_routers
from training.batches import Row, collate, encode_example
from training.composite_data import COMPOSITE, GROUPS, INTENTS, UNSEEN_FILE, parts, pieces, write_composite_data
from training.config import TrainingConfig
from training.data import Example, read_examples, read_task_folder
from training.grouped import GroupedRouting, MakeRouting, frozen_mixture, train_routings
from training.grow import add_task
from training.metrics import spread
from training.precision import base_dtype
from training.score import normalise
from training.seeds import seed_for

FIGURES = ("exact", "parts", "unseen_exact", "unseen_parts")
RESULTS = Path(__file__).parent / "results" / "grouped.json"
_ASKED_AT_ONCE = 20
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


class StaticRouting(nn.Module):
    """`softmax(b)`: weights of a layer's experts that are learned, and the same for every token."""

    def __init__(self, labels: Sequence[str]) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(len(labels)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, E]."""
        return torch.softmax(self.bias, dim=0).expand(x.shape[0], -1)


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


def score(base: BaseModel, ffns: Mapping[int, MixtureFFN], asked: Mapping[str, Sequence[Question]]) -> dict[str, float]:
    """Exact answers and right parts, in points; `asked` holds what stands before their names, and questions."""
    results = {}
    for prefix, questions in asked.items():
        with attached(base.model, ffns):
            answers = greedy_answers(base, questions)
        pairs = list(zip(answers, questions, strict=True))
        exact = [normalise(answer) == normalise(one.expected) for answer, one in pairs]
        found = [part in parts(answer) for answer, one in pairs for part in parts(one.expected)]
        results |= {f"{prefix}exact": 100 * statistics.mean(exact), f"{prefix}parts": 100 * statistics.mean(found)}
    return results


@dataclass(frozen=True)
class Bench:
    """What all methods share."""

    base: BaseModel
    template: PromptTemplate
    sets: Mapping[str, Mapping[int, Expert]]
    rows: Sequence[Row]
    examples: Mapping[str, Sequence[Example]]
    questions: Mapping[str, Sequence[Question]]

    def mixture(self, make: MakeRouting, seed: int) -> dict[int, MixtureFFN]:
        """The experts under routings of their own."""
        return frozen_mixture(self.base, self.sets, GROUP_OF, {}, make, seed=seed)

    def constant(self, weights: Mapping[str, float]) -> dict[int, MixtureFFN]:
        """The experts under the same weights for every token; those not named have none."""
        found = [weights.get(task, 0.0) for task in self.sets]
        return self.mixture(lambda _labels, _general, _generator: ConstantRouting(found), 0)

    def ask(self, ffns: Mapping[int, MixtureFFN]) -> dict[str, float]:
        """Scores on all questions."""
        return score(self.base, ffns, self.questions)


def grouping_of(groups: Sequence[str]) -> Grouping:
    """Weights by group for every token, at the usual temperatures, with no group left out and no general expert."""
    return Grouping(
        groups=tuple(groups),
        scope="token",
        within="input",
        tau_group=1.0,
        tau_expert=1.0,
        epsilon=0.0,
        share=1.0,
        general=None,
    )


def trained(bench: Bench, method: str, config: TrainingConfig) -> dict[str, float]:
    """Train `grouped`, `flat` or `static` routers with one seed, and ask."""
    width = bench.base.info.width
    grouping = grouping_of([GROUP_OF[task] for task in bench.sets])

    def make(labels: Sequence[str], general: bool, generator: torch.Generator) -> nn.Module:
        if method == "flat":
            return FlatRouting(labels, width, generator)
        if method == "static":
            return StaticRouting(labels)
        return GroupedRouting(grouping, labels, width, has_general=general, generator=generator)

    ffns = bench.mixture(make, config.seed)
    train_routings(bench.base, ffns, bench.rows, name=COMPOSITE, summaries=None, config=config)
    count = sum(p.numel() for ffn in ffns.values() for p in ffn.weigh.parameters())  # type: ignore[union-attr]
    return {**bench.ask(ffns), "trained_parameters": count}


def untrained(bench: Bench) -> dict[str, dict[str, float]]:
    """Arrow, the uniform mean and the best single expert: none of them is drawn, so one run says all."""
    results = {}
    for top_k in (1, 2):
        layers = iter(arrow_routers(bench.sets, bench.base.info.width).values())
        ffns = bench.mixture(lambda _labels, _general, _generator: ArrowRouting(next(layers), top_k), 0)  # noqa: B023
        results[f"arrow_top_{top_k}"] = bench.ask(ffns)
    results["uniform"] = bench.ask(bench.constant(dict.fromkeys(bench.sets, 1 / len(bench.sets))))
    singles = [bench.ask(bench.constant({task: 1.0})) for task in bench.sets]
    results["best_single"] = max(singles, key=lambda found: found["parts"] + found["unseen_parts"])
    results["told"] = told(bench)
    return {name: {**found, "trained_parameters": 0} for name, found in results.items()}


@torch.inference_mode()
def told(bench: Bench) -> dict[str, float]:
    """What the experts could give: every part by its own expert alone, after the right parts before it.

    A part, with what follows it, is right where every token of it is the likeliest.
    """
    results = {}
    encode = partial(encode_example, bench.base, bench.template, max_tokens=TrainingConfig.max_tokens)
    for prefix, examples in bench.examples.items():
        right: list[list[bool]] = [[] for _ in examples]
        for task in bench.sets:
            asked = [(i, pieces(example)[task]) for i, example in enumerate(examples) if task in pieces(example)]
            with attached(bench.base.model, bench.constant({task: 1.0})):
                hits = all_likeliest(bench.base, [encode(piece) for _, piece in asked])
                for (i, _), hit in zip(asked, hits, strict=True):
                    right[i].append(hit)
        results[f"{prefix}exact"] = 100 * statistics.mean(all(found) for found in right)
        results[f"{prefix}parts"] = 100 * statistics.mean(hit for found in right for hit in found)
    return results


def all_likeliest(base: BaseModel, rows: Sequence[Row]) -> Iterator[bool]:
    """Whether every token of the row's answer is the likeliest after those before it."""
    for start in range(0, len(rows), _ASKED_AT_ONCE):
        chosen = rows[start : start + _ASKED_AT_ONCE]
        batch = collate(chosen, base.model.device)
        hidden = base.model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
        found = base.model.get_output_embeddings()(hidden[batch.predicts]).argmax(1) == batch.targets
        yield from (bool(part.all()) for part in found.split([len(row.answer) for row in chosen]))


def kept(path: Path, make: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever JSON holds
    """What the file holds; made and written where it is missing."""
    if not path.exists():
        write_json(path, make())
    return json.loads(path.read_text(encoding="utf-8"))


def main(
    *,
    base: Annotated[str, typer.Option(help="A known base, or the folder of a local one.")] = "smollm2",
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
    train_rows: Annotated[int, typer.Option(help="Rows per intent, and of composite instructions.")] = 480,
    test_rows: Annotated[int, typer.Option(help="Composite questions; and as many of unseen combinations.")] = 120,
    epochs: Annotated[int, typer.Option(help="Passes, of experts and of routers.")] = 3,
    max_steps: Annotated[int | None, typer.Option(help="Upper bound on steps of each training.")] = None,
    router_steps: Annotated[
        int | None, typer.Option(help="Upper bound on steps of routers; default: the same.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 12,
    router_learning_rate: Annotated[float, typer.Option(help="Peak rate of routers, both kinds.")] = 1e-2,
    work: Annotated[Path | None, typer.Option(help="Keeps data and trained experts between runs.")] = None,
    output: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS,
) -> None:
    """Compare ways to mix frozen experts on composite instructions."""
    keep_freed_memory()
    folder, place = work or Path(tempfile.mkdtemp()), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_base(resolve_base(base, cache=cache_folder()), dtype=base_dtype("auto", place), device=place)
    data = folder / f"data-{train_rows}-{test_rows}"
    write_composite_data(data, num_train=train_rows, num_test=test_rows, seed=0)
    config = TrainingConfig(epochs=epochs, max_steps=max_steps, batch_size=batch_size, visible="own")
    composite, template = read_task_folder(data / COMPOSITE), default_template(model)
    examples = {"": composite.test, "unseen_": read_examples(data / COMPOSITE / UNSEEN_FILE)}
    bench = Bench(
        model,
        template,
        experts_of(model, data, config, folder / f"experts-{train_rows}-{epochs}-{max_steps}-{batch_size}"),
        [encode_example(model, template, e, max_tokens=config.max_tokens) for e in composite.train],
        examples,
        {
            prefix: [question(model, template.encode(model.tokenizer, e.input), e) for e in rows]
            for prefix, rows in examples.items()
        },
    )
    settings = {"train_rows": train_rows, "test_rows": test_rows, "epochs": epochs, "max_steps": max_steps}
    router_steps = max_steps if router_steps is None else router_steps
    settings |= {"batch_size": batch_size, "router_learning_rate": router_learning_rate, "router_steps": router_steps}
    results = folder / f"{seed_for(0, json.dumps(settings)):012x}"  # other settings never share what is kept
    results.mkdir(exist_ok=True)
    runs = {name: [found] for name, found in kept(results / "untrained.json", lambda: untrained(bench)).items()}
    chosen = [int(text) for text in seeds.split(",")]
    for method in ("grouped", "flat", "static"):
        for seed in chosen:
            seeded = replace(config, seed=seed, router_learning_rate=router_learning_rate, max_steps=router_steps)
            make = partial(trained, bench, method, seeded)
            runs.setdefault(method, []).append(kept(results / f"{method}-{seed}.json", make))
            print(json.dumps({"method": method, "seed": seed, **runs[method][-1]}), flush=True)
    methods = {
        name: {
            **{key: round(statistics.mean(run[key] for run in found), 2) for key in FIGURES},
            **{f"{key}_sd": round(spread([run[key] for run in found]), 2) for key in FIGURES},
            "trained_parameters": int(found[0]["trained_parameters"]),
        }
        for name, found in runs.items()
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    origin = made_by(model.info.name, str(model.model.dtype), place.type)
    write_json(output, origin | {"seeds": chosen, "settings": settings, "methods": methods})


if __name__ == "__main__":
    typer.run(main)
