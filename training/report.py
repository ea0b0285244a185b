"""The report of one task's growth: what probing saw, what was decided, what it cost.

It does not know how any of it was measured; it is written as JSON and read back for pictures over all tasks.
Read first: `parameters_everywhere` is what the same task would have trained with an expert in every layer, so
`parameters_added / parameters_everywhere` is what an expansion policy saved.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.errors import DataError
from runtime.model.durable import write_durably

REPORT_FILE = "report.json"


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer from `first_layer` on.

    Args:
        layer: its number.
        expanded: whether the task has an expert of its own here.
        frequency: share of tokens that chose the probe; None where nothing was probed.
        frequencies: digest of each old expert's set -> share of tokens that chose it while probing.
        rise: held-out loss that masking the probe here costs, nats per answer token; None where not measured.
        copied_from: digest of the set whose expert the new one began as; None for a fresh one.
        cosine: of the trained expert's update with the one that it began as; None for a fresh one.
    """

    layer: int
    expanded: bool
    frequency: float | None
    frequencies: Mapping[str, float]
    rise: float | None
    copied_from: str | None
    cosine: float | None


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """One task.

    Args:
        task: its name.
        generation: the one that it made.
        policy: "everywhere", "paper" or "calibrated".
        settings: the policy's own numbers.
        layers: from `first_layer` on, ascending.
        probe_rows: rows that trained the probes, and rows that they were measured on; None where nothing was probed.
        probe_loss: held-out loss with all probes, nats per answer token.
        num_steps: optimiser steps of the task itself.
        final_loss: mean cross-entropy of the last tenth of these steps, nats per answer token; None without any step.
        parameters_added: of the new experts and routers.
        parameters_everywhere: the same with a new expert of the configured rank in every layer.
    """

    task: str
    generation: int
    policy: str
    settings: Mapping[str, str | float]
    layers: tuple[LayerReport, ...]
    probe_rows: tuple[int, int] | None
    probe_loss: float | None
    num_steps: int
    final_loss: float | None
    parameters_added: int
    parameters_everywhere: int

    def to_json(self) -> bytes:
        """Serialise; keys in declaration order, two-space indent, newline at the end."""
        return json.dumps(asdict(self), indent=2).encode() + b"\n"


def write_report(folder: Path, report: TaskReport) -> Path:
    """Write `report.json` into `folder`, durably; returns its place."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / REPORT_FILE
    write_durably(path, report.to_json(), kind="report")
    return path


def read_reports(folder: Path) -> tuple[TaskReport, ...]:
    """Read the reports of all tasks in `<folder>/<task>/report.json`, in the order of their generations.

    Raises:
        DataError: a file is not such a report.
    """
    reports = []
    for path in sorted(folder.glob(f"*/{REPORT_FILE}")):
        try:
            reports.append(_parse(json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(str(path), 0, f"is not a report: {error}") from error
    return tuple(sorted(reports, key=lambda report: (report.generation, report.task)))


def _parse(fields: dict[str, Any]) -> TaskReport:
    layers = tuple(LayerReport(**layer) for layer in fields.pop("layers"))
    rows = fields.pop("probe_rows")
    return TaskReport(layers=layers, probe_rows=None if rows is None else (rows[0], rows[1]), **fields)
