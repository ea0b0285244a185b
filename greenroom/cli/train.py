"""`greenroom train`: tasks arrive one after the other, each makes a new generation of the repertoire.

It does not know how a task is trained (`training.grow`); it reads options, shows progress and says what happened.
Read first: a task that the repertoire already holds is skipped, and one that was interrupted goes on from its last
checkpoint, so the command can be run again as it was.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from greenroom.cli.places import cache_folder
from greenroom.cli.train_progress import progress_bar
from runtime.errors import InvalidInputError
from training.config import (
    Dtype,
    Expansion,
    ExpansionAxis,
    ExpertStart,
    LocatorDensity,
    LocatorScore,
    TrainingConfig,
    Visible,
)

if TYPE_CHECKING:
    from runtime.model.base import BaseModel
    from runtime.model.repertoire import Repertoire
    from training.data import TaskData
    from training.team import AcceleratedTeam

_DEFAULT = TrainingConfig()
_CONFUSION_PROMPTS = 50


def train(
    *,
    repertoire: Annotated[Path, typer.Option(help="Folder of the repertoire; made by the first task.")],
    data: Annotated[str, typer.Option(help="Folder of <task>/train.jsonl and test.jsonl, or a dataset id on a hub.")],
    task: Annotated[list[str] | None, typer.Option(help="Train these tasks, in this order; default: all.")] = None,
    base: Annotated[str, typer.Option(help="A known base, or the folder of a local one.")] = "smollm2",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Of the frozen base: auto, float32 or bfloat16.")] = _DEFAULT.dtype,
    rank: Annotated[int, typer.Option(help="Rank of the new experts.")] = _DEFAULT.rank,
    alpha: Annotated[float, typer.Option(help="Experts are scaled by alpha / rank.")] = _DEFAULT.alpha,
    top_k: Annotated[int, typer.Option(help="Experts per token and layer.")] = _DEFAULT.top_k,
    visible: Annotated[
        Visible, typer.Option(help="Experts that a task may use: all that are there, or its own.")
    ] = _DEFAULT.visible,
    hyper_bottleneck: Annotated[
        int | None, typer.Option(help="Width of hyper-adapters beside the experts (HyperMoE); default: none.")
    ] = None,
    hyper_factor: Annotated[int, typer.Option(help="Rank of what the hypernetwork writes.")] = _DEFAULT.hyper_factor,
    first_layer: Annotated[
        int | None, typer.Option(help="Lowest layer with experts; default: a third of the depth.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over a task's examples.")] = _DEFAULT.epochs,
    max_steps: Annotated[int | None, typer.Option(help="Upper bound on steps per task.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = _DEFAULT.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Peak rate of the experts.")] = _DEFAULT.learning_rate,
    accumulation: Annotated[
        int, typer.Option(help="Pieces in which a step's examples are computed, to save memory.")
    ] = _DEFAULT.accumulation,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many looks at held-out loss without a gain; default: never.")
    ] = _DEFAULT.patience,
    evaluate_every: Annotated[int, typer.Option(help="Steps between two looks.")] = _DEFAULT.evaluate_every,
    held_out: Annotated[float, typer.Option(help="Share of the examples looked at.")] = _DEFAULT.held_out,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = _DEFAULT.checkpoint_every,
    expansion: Annotated[
        Expansion,
        typer.Option(help="Layers with a new expert: everywhere, or where probes ask (paper, calibrated)."),
    ] = _DEFAULT.expansion,
    expansion_axis: Annotated[
        ExpansionAxis, typer.Option(help="paper: statistics over layers, or over a layer's experts.")
    ] = _DEFAULT.expansion_axis,
    expansion_alpha: Annotated[
        float, typer.Option(help="paper: expand above mean - alpha * deviation.")
    ] = _DEFAULT.expansion_alpha,
    expansion_tolerance: Annotated[
        float, typer.Option(help="calibrated: nats per token that masking a probe may cost.")
    ] = _DEFAULT.expansion_tolerance,
    probe_share: Annotated[float, typer.Option(help="Share of the examples that probing uses.")] = _DEFAULT.probe_share,
    probe_steps: Annotated[int, typer.Option(help="Steps of the probes.")] = _DEFAULT.probe_steps,
    expert_start: Annotated[
        ExpertStart, typer.Option(help="After probing, begin with a copy of the most-used old expert, or fresh.")
    ] = _DEFAULT.expert_start,
    locator_density: Annotated[
        LocatorDensity, typer.Option(help="Of a new repertoire: what is fitted to each task's prompts.")
    ] = _DEFAULT.locator_density,
    locator_score: Annotated[
        LocatorScore, typer.Option(help="Of a new repertoire: how tasks are compared.")
    ] = _DEFAULT.locator_score,
    locator_feature: Annotated[
        str | None,
        typer.Option(help="Of a new repertoire: embedding, layer:N, parts or last; default: parts, with VAEs layer:N."),
    ] = _DEFAULT.locator_feature,
    locator_false_abstain: Annotated[
        float, typer.Option(help="Share of a task's own prompts that may be located nowhere.")
    ] = _DEFAULT.locator_false_abstain,
    report: Annotated[
        Path | None,
        typer.Option(help="Folder for reports and pictures; default: beside the repertoire."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest prompt plus answer.")] = _DEFAULT.max_tokens,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = _DEFAULT.seed,
    key: Annotated[
        Path | None, typer.Option(help="Private key (ed25519, PEM): sign the new generations with it.")
    ] = None,
) -> None:
    """Train tasks one after the other; each adds experts, a router and a locator entry, and moves nothing older."""
    config = TrainingConfig(
        dtype=dtype,
        rank=rank,
        alpha=alpha,
        top_k=top_k,
        visible=visible,
        hyper_bottleneck=hyper_bottleneck,
        hyper_factor=hyper_factor,
        first_layer=first_layer,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        accumulation=accumulation,
        patience=patience,
        evaluate_every=evaluate_every,
        held_out=held_out,
        checkpoint_every=checkpoint_every,
        expansion=expansion,
        expansion_axis=expansion_axis,
        expansion_alpha=expansion_alpha,
        expansion_tolerance=expansion_tolerance,
        probe_share=probe_share,
        probe_steps=probe_steps,
        expert_start=expert_start,
        locator_density=locator_density,
        locator_score=locator_score,
        locator_feature=locator_feature,
        locator_false_abstain=locator_false_abstain,
        learning_rate=learning_rate,
        max_tokens=max_tokens,
        seed=seed,
    )
    team = _join_team(device)
    console = Console(soft_wrap=True, highlight=False, quiet=team is not None and team.index != 0)
    from runtime.model.repertoire import Repertoire
    from runtime.model.signature import Signer

    store = Repertoire(repertoire)
    signer = Signer.load(key) if key else None
    held = store.manifest().task_names() if store.head() is not None else ()
    waiting = []
    for arriving in _chosen(_read(data), task):
        if arriving.name in held:
            console.print(f"{arriving.name}: already in the repertoire, skipped")
        else:
            waiting.append(arriving)
    if not waiting:
        return
    import torch

    from runtime.kernels.freed_memory import keep_freed_memory
    from runtime.model.base import load_base, resolve_base
    from training.grow import add_task
    from training.precision import base_dtype

    keep_freed_memory()
    name = device_name(device, has_cuda=torch.cuda.is_available())
    place = torch.device(name) if team is None else team.device
    folder = resolve_base(base, cache=cache_folder())
    with console.status(f"loading {base}"):
        model = load_base(folder, dtype=base_dtype(config.dtype, place), device=place)
    reports = report or repertoire.with_name(f"{repertoire.name}-training")
    for arriving in waiting:
        console.print(f"{arriving.name}: {len(arriving.train)} examples")
        started = time.monotonic()
        with progress_bar(console, arriving.name) as (on_phase, on_progress):
            manifest = add_task(
                store,
                model,
                arriving,
                config,
                signer=signer,
                report_folder=reports / arriving.name,
                team=team,
                on_phase=on_phase,
                on_progress=on_progress,
            )
        console.print(
            f"generation {manifest.generation}: {arriving.name} added, {manifest.tasks[-1].trained_parameters:,} "
            f"parameters trained in {time.monotonic() - started:.0f} s"
        )
        if team is None or team.index == 0:
            _draw_losses(reports / arriving.name)
    if team is not None:
        team.end()
        if team.index != 0:
            return
    _tell_growth(console, reports, tuple(arriving.name for arriving in waiting))
    _tell_confusion(console, store, model, reports, _read(data))


def _join_team(device: str) -> AcceleratedTeam | None:
    """The processes that `accelerate launch` started; None for one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from training.team import AcceleratedTeam

    return AcceleratedTeam(cpu=device == "cpu")


def _draw_losses(folder: Path) -> None:
    from training.journal import read_losses
    from training.pictures import can_draw, draw_losses

    if can_draw():
        draw_losses(read_losses(folder), folder / "losses.png")


def _tell_growth(console: Console, folder: Path, names: tuple[str, ...]) -> None:
    """One line per task on where it got experts, and the picture of all tasks."""
    from training.pictures import can_draw, draw_growth
    from training.report import read_reports

    reports = read_reports(folder)
    for report in reports:
        if report.task in names:
            share = report.parameters_added / report.parameters_everywhere
            console.print(
                f"{report.task}: own experts in {sum(layer.expanded for layer in report.layers)} of "
                f"{len(report.layers)} layers, {share:.0%} of the parameters of an expert everywhere"
            )
    if can_draw():
        draw_growth(reports, folder / "growth.png")
        console.print(f"reports and growth.png in {folder}")
    else:
        console.print(f"reports in {folder}; pictures need the extra `plots`: pip install 'greenroom[plots]'")


def _tell_confusion(
    console: Console, store: Repertoire, model: BaseModel, folder: Path, tasks: tuple[TaskData, ...]
) -> None:
    """How well the locator tells the repertoire's tasks apart, on held-out prompts of the tasks in the data."""
    from runtime.model.generation import open_generation
    from training.confusion import draw_confusion, measure_confusion, write_confusion
    from training.pictures import can_draw

    texts = {task.name: [example.input for example in task.test[:_CONFUSION_PROMPTS]] for task in tasks}
    found = measure_confusion(open_generation(store), model, texts)
    write_confusion(folder / "confusion.json", found)
    if can_draw():
        draw_confusion(found, folder / "confusion.png")
    console.print(
        f"located right: {found[0].accuracy:.1%} of up to {_CONFUSION_PROMPTS} held-out prompts per task, "
        f"{found[0].abstained:.1%} located nowhere; all scores in {folder / 'confusion.json'}"
    )


def _read(data: str) -> tuple[TaskData, ...]:
    from training.data import load_hub_dataset, read_tasks

    folder = Path(data).expanduser()
    if folder.exists() or data.startswith((".", "/", "~")):
        return read_tasks(folder)
    return (load_hub_dataset(data),)


def _chosen(found: tuple[TaskData, ...], names: list[str] | None) -> tuple[TaskData, ...]:
    """The tasks of these names in this order; all where none are given."""
    if not names:
        return found
    by_name = {arriving.name: arriving for arriving in found}
    for name in names:
        if name not in by_name:
            raise InvalidInputError("task", name, f"the data hold {', '.join(by_name)}")
    return tuple(by_name[name] for name in dict.fromkeys(names))


def device_name(device: str, *, has_cuda: bool) -> str:
    """What a flag `--device auto|cpu|cuda` means on this machine.

    Raises:
        InvalidInputError: none of these, or there is no such device.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InvalidInputError("device", device, "must be auto, cpu or cuda")
    if device == "cuda" and not has_cuda:
        raise InvalidInputError("device", device, "this machine has no CUDA device that torch can use")
    return device if device != "auto" else "cuda" if has_cuda else "cpu"
