"""docs/RESULTS.md shows the figures that are committed, not others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from training_report import DOCUMENT, PARTS, RESULTS, part, shown  # noqa: E402 - lies in no package


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_the_document_is_what_the_committed_results_say(name: str) -> None:
    assert shown(DOCUMENT.read_text(encoding="utf-8"), name) == part(name)


def test_the_pictures_of_the_document_are_committed() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for picture in ("continual.png", "continual-growth.png"):
        assert f"](../benchmarks/results/{picture})" in text
        assert (RESULTS / picture).stat().st_size > 1000
