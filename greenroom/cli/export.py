"""`greenroom export`: a generation, or one mixture of it, as files for other runtimes.

It does not know what the targets are or how they are verified (`exporters.targets`).
Read first: all target names and options are checked before the first target is exported; a target gets those options
that it takes, and an option that none of them takes is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from greenroom.cli.places import cache_folder
from runtime.errors import InvalidInputError

if TYPE_CHECKING:
    from exporters.options import Options

_NAMES = "onnx-locator, onnx-router, onnx-experts, onnx-features, onnx-model, peft, merged, gguf-lora, triton"


def export(
    targets: Annotated[
        list[str] | None, typer.Argument(metavar="TARGET", help=f"{_NAMES}; default: the first three.")
    ] = None,
    *,
    repertoire: Annotated[Path, typer.Option(help="Folder of the repertoire.")],
    generation: Annotated[int | None, typer.Option(min=1, help="Its number; default: the current one.")] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="NAME_OR_PATH", help="Base model, for onnx-features, onnx-model, peft and merged."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Whose mixture, for peft, merged and gguf-lora, or whose router, for onnx-router."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Fixed weights in the router's place: uniform, only-own (with --task), or red=0.7,blue=0.3."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL with an input per row: onnx-features must locate them as torch does.")
    ] = None,
    arch: Annotated[str | None, typer.Option(help="GPU architecture such as sm_90, for triton; default: all.")] = None,
    dtype: Annotated[str | None, typer.Option(help="What triton kernels compute in; default: all.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Of the weights of onnx-model: float32 (the default), int8 or int4.")
    ] = None,
    opset: Annotated[int | None, typer.Option(help="Of ONNX graphs: 18 (the default) to 21.")] = None,
) -> None:
    """Export a generation, each file checked against torch; what is there already is not made again."""
    from exporters.options import Options
    from exporters.targets import SIMPLE_TARGETS
    from exporters.targets import export as export_target
    from runtime.model.base import resolve_base
    from runtime.model.repertoire import Repertoire

    options = Options(
        base=None if base is None else resolve_base(base, cache=cache_folder()),
        task=task,
        weights=weights,
        prompts=prompts,
        arch=arch,
        dtype=dtype,
        precision=precision,
        opset=opset,
    )
    shares = _shares(tuple(dict.fromkeys(targets or SIMPLE_TARGETS)), options)
    store = Repertoire(repertoire)
    console = Console(soft_wrap=True, highlight=False)
    number = store.manifest(generation).generation  # one for all targets, whoever publishes meanwhile
    table = Table("target", "files", "bytes", "max error", "time", "folder", box=None)
    for column in table.columns[1:-1]:
        column.justify = "right"
    skipped = []
    with console.status("reading the repertoire") as status:
        for target, share in shares.items():
            done = export_target(
                store,
                target,
                generation=number,
                options=share,
                on_progress=lambda text, target=target: status.update(f"{target}: {text}"),  # type: ignore[misc]
            )
            manifest = done.manifest
            skipped += [f"{target}: task {task} is left out: {reason}" for task, reason in manifest.skipped.items()]
            table.add_row(
                target,
                str(len(manifest.files)),
                f"{manifest.num_bytes():,}",
                f"{manifest.max_error():.1e}",
                "already there" if done.was_there else f"{done.seconds:.1f} s",
                done.folder.name,
            )
    console.print(table)
    for line in skipped:
        console.print(line)
    console.print(f"generation {number}, in {store.export_folder(number, 'any').parent}")


def _shares(targets: tuple[str, ...], options: Options) -> dict[str, Options]:
    """Each target with those of the options that it takes.

    Raises:
        InvalidInputError: there is no such target, it lacks an option, or nobody takes one.
    """
    from exporters.targets import TARGETS, check_target

    shares = {}
    for name in targets:
        check_target(name)
        target = TARGETS[name]
        shares[name] = options.only(target.required | target.optional)
        shares[name].check(name, required=target.required, optional=target.optional)
    for option in options.given():
        if all(getattr(share, option) is None for share in shares.values()):
            raise InvalidInputError(option, str(getattr(options, option)), f"none of {', '.join(targets)} takes it")
    return shares
