"""`greenroom export`: locator and routers of a generation as files for other runtimes.

It does not know what the targets are or how they are verified (`exporters.targets`).
Read first: all target names are checked before the first one is exported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def export(
    targets: Annotated[
        list[str] | None, typer.Argument(metavar="TARGET", help="onnx-locator, onnx-router; default: all.")
    ] = None,
    *,
    repertoire: Annotated[Path, typer.Option(help="Folder of the repertoire.")],
    generation: Annotated[int | None, typer.Option(min=1, help="Its number; default: the current one.")] = None,
) -> None:
    """Export a generation, checked against torch in onnxruntime; what is there already is not made again."""
    from exporters.targets import TARGETS, check_target
    from exporters.targets import export as export_target
    from runtime.model.repertoire import Repertoire

    chosen = tuple(dict.fromkeys(targets or TARGETS))
    for target in chosen:
        check_target(target)
    store = Repertoire(repertoire)
    console = Console(soft_wrap=True, highlight=False)
    number = store.manifest(generation).generation  # one for all targets, whoever publishes meanwhile
    table = Table("target", "files", "bytes", "max error", "time", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    with console.status("reading the repertoire") as status:
        for target in chosen:
            done = export_target(
                store,
                target,
                generation=number,
                on_progress=lambda text, target=target: status.update(f"{target}: {text}"),  # type: ignore[misc]
            )
            manifest = done.manifest
            table.add_row(
                target,
                str(len(manifest.files)),
                f"{manifest.num_bytes():,}",
                f"{manifest.max_error():.1e}",
                "already there" if done.was_there else f"{done.seconds:.1f} s",
            )
    console.print(table)
    console.print(f"generation {number}, in {store.export_folder(number, chosen[0]).parent}")
