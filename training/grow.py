"""Grow a repertoire by one task: train it and publish it (`training.publish`).

It does not know the command line, nor what happens inside the training loops it calls.
Read first: everything older is carried over as it is, entry by entry and byte by byte; a repertoire with N tasks
becomes one with N + 1, or stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from runtime.model.base import BaseModel
from runtime.model.expert import pack_expert_set
from runtime.model.generation import base_ref
from runtime.model.manifest import Manifest
from runtime.model.repertoire import Repertoire
from runtime.model.routers import router_tensor_name
from runtime.model.signature import Signer
from training.batches import encode_example
from training.config import TrainingConfig
from training.data import TaskData
from training.hyper import pack_hyper
from training.journal import CHECKPOINT_FILE
from training.learn import OlderSet, learn
from training.loop import Surroundings
from training.publish import NewTask, publish_task, stand_on
from training.report import write_report
from training.steps import Progress
from training.task import TrainedTask
from training.team import Alone, Team


def add_task(
    repertoire: Repertoire,
    base: BaseModel,
    task: TaskData,
    config: TrainingConfig,
    *,
    signer: Signer | None = None,
    report_folder: Path | None = None,
    team: Team | None = None,
    on_phase: Callable[[str], None] = lambda _phase: None,
    on_progress: Progress = lambda _step, _num_steps, _loss: None,
) -> Manifest:
    """Train `task` on top of the current generation and publish the result as the next one.

    The first task makes the repertoire: prompt template, first layer and the locator's frame are decided then, for
    good. One seed gives one generation, byte for byte, on one machine.

    Args:
        repertoire: may be empty.
        base: the frozen base; must be the one that the repertoire was made for.
        task: only its training rows are used.
        config: see `TrainingConfig`.
        signer: signs the new generation; None leaves it unsigned.
        report_folder: of this task; gets `losses.jsonl` and checkpoints while it trains, from which a training that was
            killed goes on, and `report.json` (`training.report`) when the generation is published.
        team: the processes that train together; the first of them publishes, and all return the same.
        on_phase: called with "probing", "training" and "locating" as these begin.
        on_progress: called after every step of the experts' training.

    Returns:
        the manifest of the new generation.

    Raises:
        InvalidInputError: the repertoire holds a task of this name, `first_layer` contradicts it, or a row is too long.
        BaseMismatchError: the repertoire was made for another base.
        GenerationMismatchError: somebody else published while this was training.
        RepertoireError: the repertoire cannot be read.
    """
    team = team or Alone()
    ground = stand_on(repertoire, base, task.name, config)
    ref = base_ref(base.info)
    rows = [encode_example(base, ground.template, example, max_tokens=config.max_tokens) for example in task.train]
    held_sets = ground.current.experts if ground.current else ()
    older_sets = held_sets if config.visible == "all" else ()
    older = [
        OlderSet(entry.digest, {unit.layer: repertoire.read_unit(entry, unit, ref) for unit in entry.units})
        for entry in older_sets
    ]
    learned = learn(
        base,
        rows,
        older,
        name=task.name,
        first_layer=ground.first_layer,
        generation=ground.current.generation + 1 if ground.current else 1,
        config=config,
        around=Surroundings(folder=report_folder, team=team, on_progress=on_progress),
        on_phase=on_phase,
    )
    trained = learned.trained
    if team.index != 0:
        team.wait()
        return repertoire.manifest()
    on_phase("locating")
    own = (
        pack_expert_set(trained.experts, task=task.name, dtype=config.store_dtype, base=ref)
        if trained.experts
        else None
    )
    visible = [entry.digest for entry in older_sets]
    new = NewTask(
        name=task.name,
        prompts=[row.asked for row in rows],
        experts=(own[1], own[0]) if own else None,
        router={router_tensor_name(layer): weight for layer, weight in trained.routers.items()},
        kind="top_k",
        top_k=trained.top_k,
        usage=tuple(shares for _, shares in sorted(trained.usage.items())),
        visible=(*visible, own[1].digest) if own else tuple(visible),
        hyper=pack_hyper(trained.hyper, top_k=trained.top_k) if trained.hyper else None,
        trained_parameters=_num_parameters(trained),
    )
    manifest = publish_task(repertoire, base, ground, new, config, signer=signer)
    if report_folder is not None:
        write_report(report_folder, learned.report)
        (report_folder / CHECKPOINT_FILE).unlink(missing_ok=True)
    team.wait()
    return manifest


def _num_parameters(trained: TrainedTask) -> int:
    """Parameters of experts, routers and hypernetwork."""
    experts = sum(expert.num_parameters for expert in trained.experts.values())
    hyper = sum(weight.numel() for weight in trained.hyper.parameters()) if trained.hyper else 0
    return experts + hyper + sum(weight.numel() for weight in trained.routers.values())
