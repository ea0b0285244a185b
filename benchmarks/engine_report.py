"""The results of benchmarks/engine.py and engine_quality.py as people read them: tables in Markdown, and a picture.

It does not know how they were measured.
Read first: a cell is tokens per second, and in brackets the mean seconds to the first token.

    python benchmarks/engine_report.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "engine.json"
QUALITY = RESULTS.with_name("engine_quality.json")
WORKLOADS = ("W1", "W2", "W3", "W4", "W5b1", "W5b8", "W5b16", "W6", "W7")
DRAWN = ("W1", "W2", "W3", "W4", "W5b1", "W5b8", "W5b16", "W6")


def by_system(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Name of a system and what it computes in -> workload -> row; ours first."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["system"] != "greenroom"):
        found.setdefault(f"{row['system']} {row['dtype']}", {})[row["workload"]] = row
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """One line per system."""
    lines = ["| | " + " | ".join(WORKLOADS) + " | peak MB |", "|---" * (len(WORKLOADS) + 2) + "|"]
    for name, found in by_system(rows).items():
        cells = [
            f"{found[each]['tokens_per_s']:.0f} ({found[each]['ttft_s']:.2f})" if each in found else ""
            for each in WORKLOADS
        ]
        peak = max(row["peak_rss_mb"] for row in found.values())
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {peak} |")
    return "\n".join(lines)


def quality_table(found: dict[str, Any]) -> str:
    """One line per kind of weights of benchmarks/engine_quality.py."""
    columns = ("answers_equal", "tokens_before_first_difference", "nats_per_token", "perplexity", "batches_equal_alone")
    lines = ["| | " + " | ".join(name.replace("_", " ") for name in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in found.items():
        if isinstance(row, dict):
            lines.append(f"| {name} | " + " | ".join(str(row[column]) for column in columns) + " |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of tokens per second, one group per workload."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    systems = by_system(rows)
    figure, axes = plt.subplots(figsize=(12, 4.5), layout="constrained")
    width = 0.9 / len(systems)
    for place, (name, found) in enumerate(systems.items()):
        heights = [found[each]["tokens_per_s"] if each in found else 0 for each in DRAWN]
        ours = name.startswith("greenroom")
        at = [group + (place - len(systems) / 2) * width for group in range(len(DRAWN))]
        shade = plt.get_cmap("Greens")(0.9 - 0.15 * place) if ours else plt.get_cmap("Greys")(0.25 + 0.07 * place)
        axes.bar(at, heights, width, label=name, color=shade)
    axes.set_xticks(range(len(DRAWN)), DRAWN)
    axes.set_ylabel("tokens per second")
    axes.legend(ncols=2, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print and draw."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    print(table(rows))
    if QUALITY.is_file():
        print(quality_table(json.loads(QUALITY.read_text(encoding="utf-8"))))
    draw(rows, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
