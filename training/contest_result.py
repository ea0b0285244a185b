"""From the records of a comparison to its figures: metrics per method, the locator, what was promised.

It does not know models or files: records in, one JSON-ready dictionary out, and a Markdown table of it.
Read first: scores are points, 0..100; rates of the locator are shares, 0..1. With several seeds a figure is their mean,
and `sd` holds the standard deviations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from training.located import NOBODY, Record
from training.metrics import continual_metrics, seen_means, spread
from training.report import TaskReport

METRICS = ("mft", "mfn", "maa", "bwt")
_LABELS = {
    "zero_shot": "base alone",
    "sequential_lora": "one LoRA in sequence",
    "moelora": "MoELoRA in sequence",
    "per_task_oracle": "LoRA per task, task given",
    "per_task_locator": "LoRA per task, located",
    "everywhere_oracle": "shared, expert in every layer, task given",
    "everywhere_locator": "shared, expert in every layer, located",
    "pgke_oracle": "PGKE, task given",
    "pgke_locator": "PGKE, located",
}

Run = Mapping[str, Sequence[Record]]
"""One seed: contender -> records, one per stage."""


def result_of(runs: Mapping[int, Run], *, tasks: Sequence[str], lookalikes: Sequence[str]) -> dict[str, Any]:
    """The figures.

    Args:
        runs: seed -> what `run_contest` returned.
        tasks: in the order of their arrival.
        lookalikes: those of them that resemble one another.
    """
    per_seed = {seed: _methods(run) for seed, run in runs.items()}
    names = list(next(iter(per_seed.values())))
    return {
        "tasks": list(tasks),
        "lookalikes": list(lookalikes),
        "seeds": list(runs),
        "methods": {name: _mean_method([methods[name] for methods in per_seed.values()]) for name in names},
        "locator": _mean_locator([_locator(run, lookalikes) for run in runs.values()]),
        "expansion": _expansion(per_seed),
        "old_outputs_bit_identical": {
            name: not any(record["moved"] for run in runs.values() for record in run[name])
            for name, records in next(iter(runs.values())).items()
            if records[0]["promises"]
        },
        "skipped": "an answer is not computed again while the outputs of the mixture are bit-identical",
    }


def growth_of(report: TaskReport) -> dict[str, Any]:
    """Of one task's report: the layers that got an expert, how often each layer's probe was chosen, and the cost."""
    return {
        "task": report.task,
        "policy": report.policy,
        "settings": dict(report.settings),
        "layers": [layer.layer for layer in report.layers if layer.expanded],
        "frequency": {layer.layer: round(layer.frequency, 4) for layer in report.layers if layer.frequency is not None},
        "parameters_added": report.parameters_added,
        "parameters_everywhere": report.parameters_everywhere,
    }


def table(result: Mapping[str, Any]) -> str:
    """The methods as a Markdown table, best MFN last."""
    lines = ["| method | MFT | MFN | MAA | BWT | trained parameters |", "|---|---|---|---|---|---|"]
    for name, method in sorted(result["methods"].items(), key=lambda item: item[1]["mfn"]):
        cells = [f"{method[key]:.1f}{_sd(method, key)}" for key in METRICS]
        lines.append(f"| {_LABELS[name]} | {' | '.join(cells)} | {method['trained_parameters']:,} |")
    return "\n".join(lines) + "\n"


def _sd(method: Mapping[str, Any], key: str) -> str:
    return f" ± {method['sd'][key]:.1f}" if len(method["scores"]) > 1 else ""


def _methods(run: Run) -> dict[str, dict[str, Any]]:
    """Method -> its matrix in points and what it trained."""
    methods: dict[str, dict[str, Any]] = {}
    for contender, records in run.items():
        last = records[-1]
        located = "located" in last
        methods[f"{contender}_oracle" if located else contender] = _method(records, "given", last["parameters"])
        if located:
            methods[f"{contender}_locator"] = _method(records, "located", last["parameters_locating"])
    return methods


def _method(records: Sequence[Record], key: str, parameters: int) -> dict[str, Any]:
    matrix = [[100 * score for score in record[key]] for record in records]
    return {"matrix": matrix, "parameters": parameters, "learn_s": sum(record["learn_s"] for record in records)}


def _mean_method(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = [asdict(continual_metrics(seed["matrix"])) for seed in seeds]
    curves = [seen_means(seed["matrix"]) for seed in seeds]
    return {
        **{key: round(_mean([metrics[key] for metrics in found]), 3) for key in METRICS},
        "trained_parameters": round(_mean([seed["parameters"] for seed in seeds])),
        "sd": {key: round(spread([metrics[key] for metrics in found]), 3) for key in METRICS},
        "curve": [round(_mean(points), 3) for points in zip(*curves, strict=True)],
        "learn_s": round(_mean([seed["learn_s"] for seed in seeds]), 1),
        "scores": [[[round(score, 3) for score in row] for row in seed["matrix"]] for seed in seeds],
    }


def _expansion(per_seed: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> dict[str, float] | None:
    """PGKE beside an expert in every layer, task given: share of the parameters, and difference of MFN in points."""
    shares, differences = [], []
    for methods in per_seed.values():
        if not {"pgke_oracle", "everywhere_oracle"} <= methods.keys():
            return None
        grown, full = methods["pgke_oracle"], methods["everywhere_oracle"]
        shares.append(grown["parameters"] / full["parameters"])
        differences.append(continual_metrics(grown["matrix"]).mfn - continual_metrics(full["matrix"]).mfn)
    return {"parameter_share": round(_mean(shares), 4), "mfn_difference": round(_mean(differences), 3)}


def _locator(run: Run, lookalikes: Sequence[str]) -> dict[str, Any] | None:
    """Rates after the last stage, of the last contender that locates; all of them locate alike."""
    records = [records[-1] for records in run.values() if "located" in records[-1]]
    if not records:
        return None
    decisions, strangers = records[-1]["decisions"], records[-1]["strangers"]

    def accuracy(names: Sequence[str]) -> float | None:
        return _share([(decisions[name].get(name, 0), sum(decisions[name].values())) for name in names])

    return {
        "accuracy_distinct": accuracy([name for name in decisions if name not in lookalikes]),
        "accuracy_lookalike": accuracy([name for name in decisions if name in lookalikes]),
        "abstain_recall": _share([(found.get(NOBODY, 0), sum(found.values())) for found in strangers.values()]),
        "false_abstain": _share([(found.get(NOBODY, 0), sum(found.values())) for found in decisions.values()]),
        "decisions": decisions,
        "strangers": strangers,
    }


def _mean_locator(seeds: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    if seeds[0] is None:
        return None
    found = [seed for seed in seeds if seed is not None]
    rates: dict[str, Any] = {}
    for key in ("accuracy_distinct", "accuracy_lookalike", "abstain_recall", "false_abstain"):
        values = [seed[key] for seed in found if seed[key] is not None]
        rates[key] = round(_mean(values), 4) if values else None
    return rates | {"decisions": [seed["decisions"] for seed in found], "strangers": [s["strangers"] for s in found]}


def _share(pairs: Sequence[tuple[int, int]]) -> float | None:
    total = sum(count for _, count in pairs)
    return sum(part for part, _ in pairs) / total if total else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
