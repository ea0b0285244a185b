"""`greenroom base`: get a known base model, and say what a base is.

It does not know how bases are fetched, converted or digested (`runtime.model`).
Read first: heavy imports stand inside the commands, so that `greenroom --help` stays quick.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from greenroom.cli.places import cache_folder
from runtime.errors import UnknownBaseError

app = typer.Typer(help="Base models: get a known one, show what one is.", no_args_is_help=True)


@app.command()
def get(name: Annotated[str, typer.Argument(help="A known base: smollm2.")]) -> None:
    """Put a known base into the cache folder: download, convert, check its digest. Does nothing if it is there."""
    from runtime.model.smollm2 import NAME, get_smollm2

    console = Console()
    if name != NAME:
        raise UnknownBaseError(f"base {name!r} is not known; known is {NAME}. A local folder needs no `get`")
    with console.status(f"getting {name}"):
        get_smollm2(cache_folder(), progress=lambda line: console.print(line, highlight=False, soft_wrap=True))


@app.command()
def show(base: Annotated[str, typer.Argument(help="A known base, or the folder of a local one.")]) -> None:
    """Show sizes and digests of a base."""
    from runtime.model.base import describe_base, resolve_base

    folder = resolve_base(base, cache=cache_folder())
    info = describe_base(folder)
    values = {
        "name": info.name,
        "folder": folder,
        "architecture": info.architecture,
        "layers": info.num_layers,
        "width": info.width,
        "FFN width": info.ffn_width,
        "vocabulary": info.vocab_size,
        "digest": info.digest,
        "tokenizer digest": info.tokenizer_digest,
    }
    for label, value in values.items():
        typer.echo(f"{label:<18}{value}")
