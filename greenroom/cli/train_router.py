"""`greenroom train-router`: a task that mixes the experts of other tasks by named groups.

It does not know how the router is trained (`training.compose`).
Read first: the data are composite instructions, rows that want the experts of several groups at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from greenroom.cli.places import cache_folder
from greenroom.cli.train_progress import progress_bar
from runtime.errors import InvalidInputError
from training.config import TrainingConfig
from training.router_options import RouterOptions, Scope, Within

_DEFAULT = TrainingConfig()
_OPTIONS = RouterOptions()


def train_router(
    *,
    repertoire: Annotated[Path, typer.Option(help="Folder of the repertoire that holds the experts.")],
    data: Annotated[Path, typer.Option(help="Folder with train.jsonl and test.jsonl; its name is the new task's.")],
    group: Annotated[
        list[str] | None,
        typer.Option(help="name=task,task: whose experts form a group; default: the repertoire's groups."),
    ] = None,
    general: Annotated[str | None, typer.Option(help="Task whose experts are the general ones.")] = None,
    share: Annotated[
        float, typer.Option(help="Lambda, the weight of all groups; the general ones get the rest.")
    ] = _OPTIONS.share,
    scope: Annotated[Scope, typer.Option(help="Weigh every token, or every request as a whole.")] = _OPTIONS.scope,
    within: Annotated[
        Within, typer.Option(help="Weights within groups follow the input, or are static.")
    ] = _OPTIONS.within,
    tau_group: Annotated[float, typer.Option(help="Temperature between groups.")] = _OPTIONS.tau_group,
    tau_expert: Annotated[float, typer.Option(help="Temperature within groups.")] = _OPTIONS.tau_expert,
    epsilon: Annotated[float, typer.Option(help="Groups of less weight are skipped in serving.")] = _OPTIONS.epsilon,
    base: Annotated[str, typer.Option(help="A known base, or the folder of a local one.")] = "smollm2",
    epochs: Annotated[int, typer.Option(help="Passes over the examples.")] = _DEFAULT.epochs,
    max_steps: Annotated[int | None, typer.Option(help="Upper bound on steps.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = _DEFAULT.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Peak rate of the routers.")] = _DEFAULT.router_learning_rate,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = _DEFAULT.seed,
    key: Annotated[Path | None, typer.Option(help="Private key (ed25519, PEM): sign the generation with it.")] = None,
) -> None:
    """Train a grouped router over the experts of other tasks; it becomes a task that brings no experts."""
    options = RouterOptions(
        scope=scope,
        within=within,
        tau_group=tau_group,
        tau_expert=tau_expert,
        epsilon=epsilon,
        share=share,
        general=general,
    )
    config = TrainingConfig(
        epochs=epochs, max_steps=max_steps, batch_size=batch_size, router_learning_rate=learning_rate, seed=seed
    )
    groups = _parse(group or [])
    import torch

    from runtime.kernels.freed_memory import keep_freed_memory
    from runtime.model.base import load_base, resolve_base
    from runtime.model.repertoire import Repertoire
    from runtime.model.signature import Signer
    from training.compose import compose
    from training.data import read_task_folder
    from training.precision import base_dtype

    keep_freed_memory()
    place = torch.device("cpu")
    console = Console(soft_wrap=True, highlight=False)
    task = read_task_folder(data)
    signer = Signer.load(key) if key else None
    folder = resolve_base(base, cache=cache_folder())
    with console.status(f"loading {base}"):
        model = load_base(folder, dtype=base_dtype(config.dtype, place), device=place)
    with progress_bar(console, task.name) as (on_phase, on_progress):
        manifest = compose(
            Repertoire(repertoire),
            model,
            task,
            groups=groups,
            options=options,
            config=config,
            signer=signer,
            on_phase=on_phase,
            on_progress=on_progress,
        )
    made = manifest.tasks[-1]
    names = ", ".join(made.router.grouping.names()) if made.router.grouping else ""
    console.print(
        f"generation {manifest.generation}: {made.name} added, a router over the groups {names}, "
        f"{made.trained_parameters:,} parameters trained"
    )


def _parse(texts: list[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for text in texts:
        name, _, tasks = text.partition("=")
        found = [task.strip() for task in tasks.split(",") if task.strip()]
        if not name or not found or name in groups:
            raise InvalidInputError("group", text, "must be name=task,task, each name once")
        groups[name] = found
    return groups
