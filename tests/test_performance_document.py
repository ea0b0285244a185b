"""docs/PERFORMANCE.md shows the figures that are committed, not others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from engine_report import QUALITY, RESULTS, quality_table, table  # noqa: E402 - lies in no package


def shown(name: str) -> str:
    """What stands between a table's marks."""
    text = (ROOT / "docs" / "PERFORMANCE.md").read_text(encoding="utf-8")
    return text.split(f"<!-- {name} -->\n", 1)[1].split(f"<!-- /{name} -->", 1)[0].strip()


def test_the_table_is_that_of_the_committed_results() -> None:
    assert shown("table") == table(json.loads(RESULTS.read_text(encoding="utf-8"))["rows"])


def test_what_rounded_weights_cost_is_that_of_the_committed_results() -> None:
    assert shown("quality") == quality_table(json.loads(QUALITY.read_text(encoding="utf-8")))
