"""The tables of docs/RESULTS.md, out of benchmarks/results/{continual,locator_unseen,locator,grouped,hyper}.json.

It measures nothing and draws nothing.
Read first: a part of the document lies between `<!-- name -->` and `<!-- /name -->`; this writes all of them anew.

    python benchmarks/training_report.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from training.contest_result import table
from training.located import NOBODY

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "RESULTS.md"
HARD = 0.9
"""Share of an unknown task's prompts that are refused, below which it is named."""

Result = Mapping[str, Any]


def origin(result: Result) -> str:
    """Command, machine and seeds."""
    seeds = ", ".join(str(seed) for seed in result["seeds"])
    made = f"{result['machine']}; base {result['base']} in {result['dtype']}; seeds {seeds}."
    return f"```bash\n{result['command']}\n```\n\n{made}"


def continual(result: Result) -> str:
    """Methods and their metrics."""
    return f"{table(result)}\n{origin(result)}"


def locator(result: Result) -> str:
    """Rates of the locator, in percent, beside what was asked for."""
    found = result["locator"]
    goals = (
        ("located right, distinct tasks", "accuracy_distinct", "95 or more"),
        ("located right, look-alikes", "accuracy_lookalike", "80 or more"),
        ("refused, prompts of tasks it never saw", "abstain_recall", "90 or more"),
        ("refused, prompts of its own tasks", "false_abstain", "5 or less"),
    )
    lines = ["| prompts | % | goal |", "|---|---|---|"]
    lines += [f"| {label} | {100 * found[key]:.1f} | {goal} |" for label, key, goal in goals]
    lines += ["", "| task it never saw | refused, % | else located at |", "|---|---|---|"]
    for name, counts in found["strangers"][0].items():
        most = sorted((-count, task) for task, count in counts.items() if task != NOBODY)[:2]
        total, refused = sum(counts.values()), counts.get(NOBODY, 0)
        where = ", ".join(f"{task} {100 * -count / total:.0f} %" for count, task in most)
        lines.append(f"| {name} | {100 * refused / total:.0f} | {where} |")
    return "\n".join(lines)


def unseen(result: Result) -> str:
    """The locator on prompts of tasks that it does not know, for every density and way to split the tasks."""
    lines = [
        "| known | density | distinct right, % | look-alikes right, % | own prompts refused, % | unknown refused, % |",
        "|---|---|---|---|---|---|",
    ]
    keys = ("accuracy_distinct", "accuracy_lookalike", "false_abstain", "abstain_recall")
    for row in result["rows"]:
        known = row["known"] if isinstance(row["known"], str) else f"{len(row['known'])} of them"
        cells = (f"{100 * row[key]:.1f}" if row.get(key) is not None else "" for key in keys)
        lines.append(f"| {known} | {row['density']} | {' | '.join(cells)} |")
    hard = {task: share for row in result["rows"][:2] for task, share in row["unseen"].items() if share < HARD}
    named = ", ".join(f"{task} {100 * share:.0f}" for task, share in sorted(hard.items(), key=lambda item: item[1]))
    told = f"Hardest to refuse in the first two rows, %: {named}."
    return "\n".join(lines) + f"\n\n{told}\n\n```bash\n{result['command']}\n```"


def many(result: Result) -> str:
    """What one decision costs among many tasks, and how often it is right."""
    lines = [
        "| tasks | density | ms per decision | ms without the pre-filter | MB | MB touched | located right, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        times = f"{row['ms_per_decision']:.2f} | {row['ms_per_decision_without_prefilter']:.1f}"
        sizes = f"{row['megabytes']:.0f} | {row['megabytes_touched']:.1f}"
        right = f"{100 * row['located_right']:.0f}"
        lines.append(f"| {row['num_tasks']:,} | {row['density']} | {times} | {sizes} | {right} |")
    return "\n".join(lines) + f"\n\n```bash\n{result['command']}\n```"


def growth(result: Result) -> str:
    """Where PGKE put experts, of the first seed, and what that cost."""
    lines = ["| task | layers with a new expert | parameters, % of an expert everywhere |", "|---|---|---|"]
    reports = next(iter(result["growth"].values()))
    for report in reports:
        share = report["parameters_added"] / report["parameters_everywhere"]
        lines.append(f"| {report['task']} | {len(report['layers'])} | {100 * share:.0f} |")
    added, everywhere = (
        sum(report[key] for report in reports) for key in ("parameters_added", "parameters_everywhere")
    )
    lines.append(f"| all | {sum(len(report['layers']) for report in reports)} | {100 * added / everywhere:.0f} |")
    return "\n".join(lines)


def grouped(result: Result) -> str:
    """Ways to mix the same frozen experts, worst first."""
    lines = [
        "| routing | whole answers right | parts right | of unseen combinations: whole | parts | trained parameters |",
        "|---|---|---|---|---|---|",
    ]
    for name, method in sorted(result["methods"].items(), key=lambda item: item[1]["parts"]):
        cells = (f"{method[key]:.1f}{_sd(method, key)}" for key in ("exact", "parts", "unseen_exact", "unseen_parts"))
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} | {method['trained_parameters']:,} |")
    return "\n".join(lines) + f"\n\n{origin(result)}"


def hyper(result: Result) -> str:
    """What stands beside the experts, highest loss first."""
    lines = ["| beside the experts | exact match | held-out loss, nats | trained parameters |", "|---|---|---|---|"]
    for name, method in sorted(result["methods"].items(), key=lambda item: -item[1]["loss"]):
        match = f"{method['exact_match']:.1f} ± {method['exact_match_sd']:.1f}"
        loss = f"{method['loss']:.3f} ± {method['loss_sd']:.3f}"
        lines.append(f"| {name.replace('_', ' ')} | {match} | {loss} | {method['trained_parameters']:,} |")
    return "\n".join(lines) + f"\n\n{origin(result)}"


def _sd(method: Result, key: str) -> str:
    return f" ± {method[f'{key}_sd']:.1f}" if method["trained_parameters"] else ""


PARTS: Mapping[str, tuple[str, Callable[[Result], str]]] = MappingProxyType(
    {
        "continual": ("continual.json", continual),
        "locator": ("continual.json", locator),
        "unseen": ("locator_unseen.json", unseen),
        "many": ("locator.json", many),
        "growth": ("continual.json", growth),
        "grouped": ("grouped.json", grouped),
        "hyper": ("hyper.json", hyper),
    }
)
"""Name of a part -> the results that it shows, and how."""


def part(name: str) -> str:
    """What the document must say in this part."""
    file, make = PARTS[name]
    return make(json.loads((RESULTS / file).read_text(encoding="utf-8"))).strip()


def shown(text: str, name: str) -> str:
    """What a document says in this part."""
    return text.split(f"<!-- {name} -->\n", 1)[1].split(f"<!-- /{name} -->", 1)[0].strip()


def main() -> None:
    """Write the parts of the document whose results are there."""
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, (file, _) in PARTS.items():
        if f"<!-- {name} -->\n" in text and (RESULTS / file).exists():
            head, rest = text.split(f"<!-- {name} -->\n", 1)
            tail = rest.split(f"<!-- /{name} -->", 1)[1]
            text = f"{head}<!-- {name} -->\n{part(name)}\n<!-- /{name} -->{tail}"
    DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
