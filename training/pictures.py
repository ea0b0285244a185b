"""Pictures of training, as PNG: where tasks got experts, and how losses fell.

It does not know how any of it was measured.
Read first: matplotlib is in the extra `plots`; everything but these pictures works without it. No window is opened and
no global state of matplotlib is touched.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.errors import InvalidInputError
from training.report import TaskReport


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(width: float, height: float, *, file: Path) -> Any:  # noqa: ANN401 - matplotlib is optional, so untyped
    """A figure of this size in inches, drawn without a screen.

    Raises:
        InvalidInputError: matplotlib is not installed; names `file`.
    """
    if not can_draw():
        raise InvalidInputError("file", str(file), "pictures need the extra `plots`: pip install 'greenroom[plots]'")
    return importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")


def draw_growth(reports: Sequence[TaskReport], file: Path) -> None:
    """Layers x tasks: how often each layer's probe was chosen; a dot marks a layer that got an expert.

    Layers in which nothing was probed stay white.

    Raises:
        InvalidInputError: matplotlib is not installed, or there is no report.
    """
    if not reports:
        raise InvalidInputError("reports", [], "there is nothing to draw")
    layers = sorted({layer.layer for report in reports for layer in report.layers})
    by_place = {(entry.layer, t): entry for t, report in enumerate(reports) for entry in report.layers}
    grid = [[float("nan")] * len(reports) for _ in layers]
    dots = []
    for i, layer in enumerate(layers):
        for t in range(len(reports)):
            entry = by_place.get((layer, t))
            if entry is not None and entry.frequency is not None:
                grid[i][t] = entry.frequency
            if entry is not None and entry.expanded:
                dots.append((t, i))
    figure = new_figure(2.5 + 0.6 * len(reports), 1.5 + 0.25 * len(layers), file=file)
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", origin="lower", cmap="viridis", vmin=0.0, vmax=1.0)
    axes.scatter([x for x, _ in dots], [y for _, y in dots], s=18, c="white", edgecolors="black")
    axes.set_xticks(range(len(reports)), [report.task for report in reports], rotation=60, ha="right")
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_xlabel("task")
    axes.set_ylabel("layer")
    axes.set_title("probe chosen (colour), expert added (dot)")
    figure.colorbar(image, label="share of tokens")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def draw_losses(lines: Sequence[Mapping[str, float]], file: Path) -> None:
    """Loss of every step, nats per answer token, and held-out loss where it was measured.

    Args:
        lines: as `training.journal.read_losses` gives them.
        file: the picture.

    Raises:
        InvalidInputError: matplotlib is not installed.
    """
    figure = new_figure(6.0, 3.5, file=file)
    axes = figure.subplots()
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], linewidth=0.8, label="training")
    looked = [line for line in lines if "held_out" in line]
    if looked:
        axes.plot([line["step"] for line in looked], [line["held_out"] for line in looked], "o-", label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per answer token")
    axes.set_yscale("log")
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
