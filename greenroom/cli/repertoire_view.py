"""Repertoires as people and programs read them: tables, or one JSON object.

It reads nothing itself; it is handed what is to be shown.
Read first: JSON has every field under its name in `runtime.model`; tables shorten digests.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from runtime.errors import GreenroomError

if TYPE_CHECKING:
    from runtime.model.audit import Audit
    from runtime.model.collect import Collected
    from runtime.model.difference import Changes, Difference
    from runtime.model.inventory import GenerationRow, TaskRow
    from runtime.model.manifest import Manifest
    from runtime.model.transfer import Transferred


def print_json(value: object) -> None:
    """One JSON object: dataclasses by field, errors as `reason` and `message`."""
    typer.echo(json.dumps(value, default=_plain, ensure_ascii=False, indent=2))


def print_list(rows: Iterable[GenerationRow]) -> None:
    """A row per generation, a star at the current one; below, why one cannot be read."""
    table = _table("generation", "parent", "tasks", "experts", "parameters", "bytes", "signed by")
    faults = []
    for row in rows:
        if row.fault is not None:
            faults.append(f"generation {row.generation} cannot be read: {row.fault}")
            continue
        number = f"{row.generation}{' *' if row.is_current else ''}"
        counts = (row.num_tasks, row.num_experts, row.parameters, row.num_bytes)
        parent = "-" if row.parent is None else str(row.parent)
        table.add_row(number, parent, *(f"{count:,}" for count in counts), _short(row.key_id))
    console = _console()
    if table.row_count:
        console.print(table)
    for fault in faults:
        console.print(Text(fault))


def print_generation(row: GenerationRow, manifest: Manifest, tasks: Iterable[TaskRow]) -> None:
    """What a generation is, and a row per task."""
    facts = {
        "generation": f"{row.generation}{' (current)' if row.is_current else ''}",
        "parent": "-" if row.parent is None else str(row.parent),
        "base": manifest.base.name,
        "first layer": str(manifest.first_layer),
        "bytes": f"{row.num_bytes:,}",
        "parameters": f"{row.parameters:,}",
        "signed by": _short(row.key_id),
    }
    console = _console()
    for label, fact in facts.items():
        console.print(Text(f"{label:<14}{fact}"))
    table = _table("task", "experts", "layers", "ranks", "dtype", "bytes", "parameters", "top k", "visible")
    for task in tasks:
        layers = f"{task.layers[0]}-{task.layers[-1]}" if task.layers else "-"
        ranks = ",".join(str(rank) for rank in task.ranks) or "-"
        counts = (task.num_bytes, task.trained_parameters, task.top_k, task.num_visible)
        table.add_row(
            task.task, _short(task.experts), layers, ranks, task.dtype or "-", *(f"{count:,}" for count in counts)
        )
    console.print(table)


def print_difference(difference: Difference) -> None:
    """What differs, by kind, and how much is shared."""
    console = _console()
    table = _table("what", "added", "removed", "changed")
    for label, changes in (("tasks", difference.tasks), ("routers", difference.routers)):
        table.add_row(label, *_cells(changes))
    table.add_row("expert sets", *_cells(difference.expert_sets, short=True))
    console.print(table)
    if difference.settings:
        console.print(Text(f"also changed: {', '.join(difference.settings)}"))
    shares = {
        "both": difference.shared,
        f"only {difference.first}": difference.only_first,
        f"only {difference.second}": difference.only_second,
    }
    table = _table("needed by", "blobs", "bytes")
    for label, share in shares.items():
        table.add_row(label, f"{share.num_blobs:,}", f"{share.num_bytes:,}")
    console.print(table)


def print_audit(audit: Audit) -> None:
    """One line per fault, and what was read."""
    for fault in audit.faults:
        typer.echo(f"generation {_numbers(fault.generations)}: {fault.where}: {fault.error.reason}: {fault.error}")
    read = f"{len(audit.generations)} generations, {audit.num_blobs:,} blobs, {audit.num_bytes:,} bytes"
    typer.echo(f"{read}: {len(audit.faults) or 'no'} fault{'' if len(audit.faults) == 1 else 's'}")


def print_collected(done: Collected, *, dry_run: bool) -> None:
    """What went and what stayed."""
    verb = "would go" if dry_run else "gone"
    lines = {
        f"generations {verb}": _numbers(done.removed),
        f"blobs {verb}": f"{done.num_blobs:,}",
        f"leftovers {verb}": f"{done.num_leftovers:,}",
        f"bytes {verb}": f"{done.freed_bytes:,}",
        "kept": _numbers(done.kept),
        "held by readers": _numbers(done.held),
    }
    for label, text in lines.items():
        typer.echo(f"{label:<24}{text}")


def print_transferred(done: Transferred, place: str) -> None:
    """What a push or pull moved."""
    typer.echo(f"{place} is at generation {done.head}")
    moved = f"{done.num_blobs:,} blobs, {done.num_bytes:,} bytes"
    typer.echo(f"moved: generations {_numbers(done.generations)}; {moved}")


def _plain(value: object) -> Any:  # noqa: ANN401 - what json.dumps takes
    if isinstance(value, GreenroomError):
        return {"reason": value.reason, "message": str(value)}
    if is_dataclass(value) and not isinstance(value, type):
        return {name: getattr(value, name) for name in (field.name for field in fields(value))}
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _cells(changes: Changes, *, short: bool = False) -> list[Text]:
    kinds = (changes.added, changes.removed, changes.changed)
    return [Text("\n".join(_short(name) if short else name for name in names) or "-") for names in kinds]


def _numbers(numbers: Iterable[int]) -> str:
    return ", ".join(str(number) for number in numbers) or "-"


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "-"


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    numeric = {"bytes", "parameters", "tasks", "blobs", "top k", "visible"}
    for heading in headings:
        table.add_column(heading, justify="right" if heading in numeric else "left", overflow="fold")
    return table


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)
