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

    def within(ratio: float, interval: tuple[float, float]) -> str:
        return f"{ratio:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"

    def one(name: str) -> str:
        return within(results[name], results[f"{name}_interval"])

    def two(name: str) -> str:
        return " and ".join(one(f"{name}_{pages}_pages") for pages in ("warm", "cold"))

    disks = ("", "_slow_disk", "_distant")

    def churn(figure: str) -> str:
        p99 = f"p99_ttft_{figure}"
        return ", ".join(within(results[f"{p99}{disk}"], results[f"{p99}_interval{disk}"]) for disk in disks)

    def also(what: str, figure: str) -> str:
        return ", ".join(f"{results[f'{what}_ttft_{figure}{disk}']:.2f}" for disk in disks)

    def every_time(figure: str) -> str:
        return also("p99", f"{figure}_every_time")

    def both(figure: str) -> str:
        return f"{also('p90', figure)} and {also('mean', figure)}"

    stalls = ", ".join(
        " / ".join(f"{results[f'stall_ms_per_request{way}{disk}']:.1f}" for way in ("", "_off", "_demand"))
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
        ("`p99_ttft_prefetch_over_demand` in churn, three storages", churn("prefetch_over_demand"), "0.75 or less"),
        ("`p99_ttft_prefetch_over_off`, guesses alone", churn("prefetch_over_off"), "0.75 or less"),
        (
            "P99 where all times of each request count, over reading on demand and guesses alone",
            f"{every_time('prefetch_over_demand')} and {every_time('prefetch_over_off')}",
            "",
        ),
        ("P90 and the mean, over reading on demand", both("prefetch_over_demand"), ""),
        ("P90 and the mean, guesses alone", both("prefetch_over_off"), ""),
        ("P99 with all experts in memory over that on demand", churn("resident_over_demand"), ""),
        ("the same over that without guesses", churn("resident_over_off"), ""),
        ("ms per request that prompts stood still: with guesses / without / on demand", stalls, ""),
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
