"""The table of docs/MEMORY.md, made of benchmarks/results/memory.json.

It measures nothing; `benchmarks/memory.py` calls it when it has written its results.
Read first: the rows between the two markers are replaced, and nothing else.

    python benchmarks/memory_table.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "memory.json"
PAGE = Path(__file__).parents[1] / "docs" / "MEMORY.md"
_BEGIN, _END = "<!-- memory -->\n", "<!-- /memory -->"


def table(results: Mapping[str, Any]) -> str:
    """Rows of figure, value and goal."""
    few, many = results["startup"]["few"], results["startup"]["many"]

    def one(name: str) -> str:
        low, high = results[f"{name}_interval"]
        return f"{results[name]:.2f} ({low:.2f} to {high:.2f})"

    def two(name: str) -> str:
        return " and ".join(one(f"{name}_{pages}_pages") for pages in ("warm", "cold"))

    def churn(storage: str, way: str = "prefetch") -> str:
        low, high = results[f"p99_ttft_{way}_over_off_interval{storage}"]
        return f"{results[f'p99_ttft_{way}_over_off{storage}']:.2f} ({low:.2f} to {high:.2f})"

    disks = ("", "_slow_disk", "_distant")
    means = " and ".join(f"{results[f'mean_ttft_prefetch_over_off{disk}']:.2f}" for disk in disks)
    floors = " and ".join(churn(disk, "resident") for disk in disks)
    stalls = " and ".join(
        f"{results[f'stall_ms_per_request{disk}']:.1f} instead of {results[f'stall_ms_per_request_off{disk}']:.1f}"
        for disk in disks
    )
    guesses = ", ".join(
        f"{results[name]:.2f}" for name in ("prefetch_precision", "prefetch_recall", "wasted_bytes_share")
    )
    experts = " and ".join(f"{row['experts_of_5_tasks_mb']:.1f}" for row in (few, many))
    rows = [
        ("`throughput_1000_over_5`", f"{results['throughput_1000_over_5']:.2f}", "0.95 or more"),
        ("start-up, ms per task of 1,000", f"{many['ms_per_task']:.2f}", "below 1"),
        ("memory of 5 tasks' experts, MB, with 5 and with 1,000 registered", experts, "the same"),
        ("memory of 1,000 tasks' densities (VAEs), MB", f"{many['densities_mb']:.0f}", ""),
        ("`throughput_at_2x_over_resident`", f"{results['throughput_at_2x_over_resident']:.2f}", "0.7 or more"),
        (
            "`cold_over_warm_ttft` with guesses, page cache warm and cold",
            two("cold_over_warm_ttft_prefetch"),
            "1.05 or less",
        ),
        ("the same with guesses, into memory that was never used", one("cold_over_warm_ttft_prefetch_growing"), ""),
        ("the same without guesses", two("cold_over_warm_ttft_off"), ""),
        ("the same of a short prompt, with guesses", two("cold_over_warm_ttft_short_prompt_prefetch"), ""),
        ("`p99_ttft_prefetch_over_off` in churn, this machine's disk", churn(""), "0.75 or less"),
        ("`p99_ttft_prefetch_over_off_slow_disk`, the same at 200 MB/s", churn("_slow_disk"), "0.75 or less"),
        ("`p99_ttft_prefetch_over_off_distant`, the same 100 ms away", churn("_distant"), "0.75 or less"),
        ("the mean instead of P99, on the three", means, ""),
        ("P99 with all experts in memory over that without guesses, on the three", floors, ""),
        (
            "ms per request that prompts stood still in churn, on the three, with guesses instead of without",
            stalls,
            "",
        ),
        ("`prefetch_precision`, `prefetch_recall`, `wasted_bytes_share`", guesses, ""),
    ]
    lines = ["| figure | value | goal |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines).replace("|  |", "| |") + "\n"


def write_table() -> None:
    """Replace the rows."""
    page = PAGE.read_text()
    begin, end = page.index(_BEGIN) + len(_BEGIN), page.index(_END)
    PAGE.write_text(page[:begin] + table(json.loads(RESULTS.read_text())) + page[end:])


if __name__ == "__main__":
    write_table()
