"""The forgetting curve as a picture: for every method the mean score on the tasks seen so far, stage by stage.

It does not know how the scores came about.
Read first: it draws the key `curve` of every method of a result; matplotlib is in the extra `plots`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.pictures import new_figure


def draw_forgetting_curve(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture as PNG.

    Args:
        result: as made by `training.contest_result.result_of`.
        path: of the file.

    Raises:
        InvalidInputError: matplotlib is not installed.
    """
    figure = new_figure(8, 5, file=path)
    axes = figure.subplots()
    stages = range(1, len(result["tasks"]) + 1)
    for name, method in result["methods"].items():
        axes.plot(stages, method["curve"], marker="o", linestyle="--" if name.endswith("_oracle") else "-", label=name)
    axes.set_xticks(list(stages), result["tasks"], rotation=30, ha="right")
    axes.set_ylabel("exact match on the tasks seen so far, points")
    axes.set_ylim(-2, 102)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")
