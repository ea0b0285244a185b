"""Grow a repertoire by one task: train it, fit its locator entry, publish the next generation.

It does not know the command line, nor what happens inside the training loops it calls.
Read first: everything older is carried over as it is, entry by entry and byte by byte; a repertoire with N tasks
becomes one with N + 1, or stays what it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from runtime.errors import InvalidInputError
from runtime.model.base import BaseModel
from runtime.model.expert import pack_expert_set
from runtime.model.generation import base_ref, check_base
from runtime.model.locator import frame_shapes
from runtime.model.manifest import BaseRef, ExpertSet, LocatorEntry, LocatorRef, Manifest, RouterRef, Task
from runtime.model.names import check_name
from runtime.model.prompt import PromptTemplate, default_template
from runtime.model.repertoire import Repertoire
from runtime.model.routers import router_tensor_name
from runtime.model.signature import Signer
from training.batches import encode_row
from training.config import TrainingConfig
from training.data import TaskData
from training.features import features
from training.learn import OlderSet, learn
from training.locator import make_frame, train_entry
from training.reference_prompts import reference_prompts
from training.report import write_report
from training.seeds import seed_for
from training.steps import Progress
from training.task import TrainedTask

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Sight:
    """One way to look at prompts: where the residual stream is read, the frame, and the reference prompts seen so."""

    layer: int
    frame: Tensors
    reference: torch.Tensor  # [M, D]


@dataclass(frozen=True)
class _Ground:
    """What a new task stands on: the current generation, or what a new repertoire begins with."""

    current: Manifest | None
    template: PromptTemplate
    first_layer: int
    locator: _Sight
    arrival: _Sight


def add_task(
    repertoire: Repertoire,
    base: BaseModel,
    task: TaskData,
    config: TrainingConfig,
    *,
    signer: Signer | None = None,
    report_folder: Path | None = None,
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
        report_folder: gets the task's `report.json` (`training.report`) after the generation is published.
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
    ground = _stand_on(repertoire, base, task.name, config)
    ref = base_ref(base.info)
    rows = [
        encode_row(base, ground.template, example.input, example.output, max_tokens=config.max_tokens)
        for example in task.train
    ]
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
        on_phase=on_phase,
        on_progress=on_progress,
    )
    trained = learned.trained
    on_phase("locating")
    prompts = [row.prompt for row in rows]
    densities = [_density(base, prompts, sight, config, task.name) for sight in (ground.locator, ground.arrival)]
    own, own_blobs = _pack(trained, task.name, config, ref)
    routers = {router_tensor_name(layer): weight.contiguous() for layer, weight in trained.routers.items()}
    router_blob = save(routers)
    frame_blobs = [save(sight.frame) for sight in (ground.locator, ground.arrival)]
    entry = Task(
        name=task.name,
        experts=own[0].digest if own else None,
        router=RouterRef(
            kind="top_k",
            digest=_sha256(router_blob),
            top_k=trained.top_k,
            visible=tuple(entry.digest for entry in (*older_sets, *own)),
        ),
        locator=densities[0].entry,
        arrival=densities[1].entry,
        trained_parameters=_num_parameters(trained, *(density.vae for density in densities)),
    )
    refs = [
        LocatorRef(frame=_sha256(blob), feature="residual_mean", layer=sight.layer, score=config.locator_score)
        for blob, sight in zip(frame_blobs, (ground.locator, ground.arrival), strict=True)
    ]
    manifest = Manifest(
        schema_version=1,
        generation=learned.report.generation,
        parent=ground.current.generation if ground.current else None,
        base=ground.current.base if ground.current else ref,
        prompt_template=ground.template.text,
        first_layer=ground.first_layer,
        locator=ground.current.locator if ground.current else refs[0],
        arrival=ground.current.arrival if ground.current else refs[1],
        experts=(*held_sets, *own),
        tasks=(*(ground.current.tasks if ground.current else ()), entry),
    )
    vae_blobs = [density.blob for density in densities]
    blobs = {_sha256(blob): blob for blob in (*frame_blobs, *own_blobs, router_blob, *vae_blobs)}
    repertoire.publish(manifest, blobs, expected=manifest.parent, signer=signer)
    if report_folder is not None:
        write_report(report_folder, learned.report)
    return manifest


def _pack(
    trained: TrainedTask, name: str, config: TrainingConfig, ref: BaseRef
) -> tuple[tuple[ExpertSet, ...], tuple[bytes, ...]]:
    """The new expert set and its bytes; neither where no layer was expanded."""
    if not trained.experts:
        return (), ()
    blob, entry = pack_expert_set(trained.experts, task=name, dtype=config.store_dtype, base=ref)
    return (entry,), (blob,)


def _stand_on(repertoire: Repertoire, base: BaseModel, name: str, config: TrainingConfig) -> _Ground:
    check_name("task", name)
    if repertoire.head() is None:
        first_layer = base.info.num_layers // 3 if config.first_layer is None else config.first_layer
        if first_layer >= base.info.num_layers:
            raise InvalidInputError("first_layer", first_layer, f"the base has {base.info.num_layers} layers")
        template = default_template(base)
        sights = [_new_sight(base, template, layer, config) for layer in (first_layer, 0)]
        return _Ground(None, template, first_layer, *sights)
    current = repertoire.manifest()
    check_base(current, base.info)
    if name in current.task_names():
        raise InvalidInputError("task", name, f"generation {current.generation} already holds it")
    if config.first_layer not in (None, current.first_layer):
        raise InvalidInputError("first_layer", config.first_layer, f"the repertoire has {current.first_layer}")
    template = PromptTemplate.parse(current.prompt_template)
    sights = [_sight_of(repertoire, base, template, ref) for ref in (current.locator, current.arrival)]
    return _Ground(current, template, current.first_layer, *sights)


def _new_sight(base: BaseModel, template: PromptTemplate, layer: int, config: TrainingConfig) -> _Sight:
    reference = _reference_features(base, template, layer)
    return _Sight(layer, make_frame(reference, seed=seed_for(config.seed, "frame", str(layer))), reference)


def _sight_of(repertoire: Repertoire, base: BaseModel, template: PromptTemplate, ref: LocatorRef) -> _Sight:
    frame = repertoire.read_tensors(ref.frame, frame_shapes(base.info.width))
    return _Sight(ref.layer, frame, _reference_features(base, template, ref.layer))


@dataclass(frozen=True)
class _Density:
    """A trained VAE, its bytes, and its entry."""

    vae: Tensors
    blob: bytes
    entry: LocatorEntry


def _density(
    base: BaseModel, prompts: Sequence[Sequence[int]], sight: _Sight, config: TrainingConfig, name: str
) -> _Density:
    own = features(base, prompts, sight.layer)
    seed = seed_for(config.seed, name, "density", str(sight.layer))
    vae, calibration = train_entry(sight.frame, own, sight.reference, config, seed=seed)
    blob = save(vae)
    entry = LocatorEntry(
        digest=_sha256(blob), mean=calibration.mean, sd=calibration.sd, threshold=calibration.threshold
    )
    return _Density(vae, blob, entry)


def _reference_features(base: BaseModel, template: PromptTemplate, layer: int) -> torch.Tensor:
    return features(base, [template.encode(base.tokenizer, text) for text in reference_prompts()], layer)


def _num_parameters(trained: TrainedTask, *vaes: Mapping[str, torch.Tensor]) -> int:
    """Parameters of experts, routers and VAEs: all that was trained for the task."""
    tensors = [*trained.routers.values(), *(tensor for vae in vaes for tensor in vae.values())]
    return sum(expert.num_parameters for expert in trained.experts.values()) + sum(t.numel() for t in tensors)


def _sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()
