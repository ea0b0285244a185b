"""`greenroom import`: experts that were trained elsewhere become tasks of a repertoire.

It does not know the formats (`training.peft_adapter`); it reads options and says what happened.
Read first: nothing is trained but the locator entry, which is fitted to the sample inputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from greenroom.cli.places import cache_folder

app = typer.Typer(help="Take experts in that were trained elsewhere.", no_args_is_help=True)


@app.callback()
def options() -> None:
    """Take experts in that were trained elsewhere."""


@app.command()
def peft(
    adapter: Annotated[Path, typer.Argument(help="Folder with adapter_config.json and adapter_model.safetensors.")],
    *,
    task: Annotated[str, typer.Option(help="Name of the new task.")],
    repertoire: Annotated[Path, typer.Option(help="Folder of the repertoire; made if there is none.")],
    samples: Annotated[
        Path | None,
        typer.Option(help="Inputs of the task, 8 or more: one per line, or JSONL with `input`. Without: pinned only."),
    ] = None,
    router: Annotated[Literal["arrow"], typer.Option(help="How experts are chosen where there are several.")] = "arrow",
    beside: Annotated[
        list[str] | None, typer.Option("--with", help="Let the router choose this task's experts too.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Experts per token and layer, with --with.")] = 2,
    base: Annotated[str, typer.Option(help="A known base, or the folder of a local one.")] = "smollm2",
    key: Annotated[
        Path | None, typer.Option(help="Private key (ed25519, PEM): sign the new generation with it.")
    ] = None,
) -> None:
    """Make a PEFT LoRA adapter a task: its experts, an Arrow router, a locator entry."""
    import torch

    from runtime.model.base import load_base, resolve_base
    from runtime.model.generation import base_ref
    from runtime.model.repertoire import Repertoire
    from runtime.model.signature import Signer
    from training.adopt import adopt
    from training.peft_adapter import read_adapter
    from training.samples import read_samples

    console = Console(soft_wrap=True, highlight=False)
    texts = read_samples(samples) if samples else ()
    signer = Signer.load(key) if key else None
    folder = resolve_base(base, cache=cache_folder())
    with console.status(f"loading {base}"):
        model = load_base(folder, dtype=torch.float32, device=torch.device("cpu"))
    read = read_adapter(adapter, base_ref(model.info))
    manifest = adopt(
        Repertoire(repertoire),
        model,
        read,
        name=task,
        samples=texts,
        beside=beside or (),
        top_k=top_k,
        signer=signer,
    )
    made = manifest.tasks[-1]
    targets = sorted({target for expert in read.experts.values() for target in expert.updates})
    console.print(
        f"generation {manifest.generation}: {task} added, "
        f"experts in {len(read.experts)} layers ({', '.join(targets)}), "
        f"{router} router over {len(made.router.visible)} expert set{'s' if len(made.router.visible) > 1 else ''}"
    )
    if not texts:
        console.print("without --samples it is never located; name it in requests")
