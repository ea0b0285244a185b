"""`greenroom locate`: which task a prompt is of, in under a second and without torch.

It does not know how locating works (`greenroom.locate`) or how its files are made (`exporters`).
Read first: where the generation was never exported for it, `--base` lets the command do that first, once, with torch.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from greenroom.cli.places import cache_folder
from runtime.errors import InvalidInputError, RepertoireError


def locate(
    prompts: Annotated[list[str], typer.Argument(help="One or more inputs; the template is put around each.")],
    *,
    repertoire: Annotated[Path, typer.Option(help="Folder of the repertoire.")],
    generation: Annotated[int | None, typer.Option(min=1, help="Its number; default: the current one.")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="NAME_OR_PATH", help="Export with this base first, if that was never done.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads for one prompt.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per prompt and line.")] = False,
) -> None:
    """Say which task each prompt is of, or none."""
    from greenroom.locate import LocatorFilesError, PromptError, PromptLocator, exports_folder, is_exported

    try:
        folder = exports_folder(repertoire, generation)
        if base is not None and not is_exported(folder):
            _export(repertoire, generation, base)
        locations = PromptLocator(folder, num_threads=threads).locate(prompts)
    except LocatorFilesError as error:
        raise RepertoireError(str(error)) from error
    except PromptError as error:
        raise InvalidInputError("prompts", prompts, str(error)) from error
    for prompt, location in zip(prompts, locations, strict=True):
        if as_json:
            typer.echo(json.dumps({"prompt": prompt, **dataclasses.asdict(location)}, ensure_ascii=False))
        else:
            typer.echo(f"{location.task or '(no task)'}  margin {location.margin:.3f}  {prompt}")


def _export(repertoire: Path, generation: int | None, base: str) -> None:
    from rich.console import Console

    from exporters.options import Options
    from exporters.targets import export
    from greenroom.locate import FEATURES, LOCATOR
    from runtime.model.base import resolve_base
    from runtime.model.repertoire import Repertoire

    options = Options(base=resolve_base(base, cache=cache_folder()))
    with Console(stderr=True).status("exporting, once for this generation") as status:
        for target, taken in ((FEATURES, options), (LOCATOR, options.only(()))):
            export(
                Repertoire(repertoire),
                target,
                generation=generation,
                options=taken,
                on_progress=lambda text, target=target: status.update(f"{target}: {text}"),  # type: ignore[misc]
            )
