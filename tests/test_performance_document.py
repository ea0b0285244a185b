"""docs/PERFORMANCE.md shows the figures that are committed, not others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from engine_report import RESULTS, table  # noqa: E402 - lies in no package


def test_the_table_is_that_of_the_committed_results() -> None:
    text = (ROOT / "docs" / "PERFORMANCE.md").read_text(encoding="utf-8")
    shown = text.split("<!-- table -->\n", 1)[1].split("<!-- /table -->", 1)[0]
    assert shown.strip() == table(json.loads(RESULTS.read_text(encoding="utf-8"))["rows"])
