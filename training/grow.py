"""Grow a repertoire by one task: train it, fit its locator entry, publish the next generation.

It does not know the command line, nor what happens inside the training loops it calls.
Read first: everything older is carried over as it is, entry by entry and byte by byte; a repertoire with N tasks
becomes one with N + 1, or stays what it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import save

from runtime.errors import InvalidInputError
from runtime.model.base import BaseModel
from runtime.model.expert import pack_expert_set
from runtime.model.generation import base_ref, check_base, router_tensor_name
from runtime.model.locator import frame_shapes
from runtime.model.manifest import LocatorEntry, LocatorRef, Manifest, RouterRef, Task
from runtime.model.names import check_name
from runtime.model.prompt import PromptTemplate, default_template
from runtime.model.repertoire import Repertoire
from training.batches import encode_row
from training.config import TrainingConfig
from training.data import TaskData
from training.features import features
from training.locator import make_frame, train_entry
from training.reference_prompts import reference_prompts
from training.task import Progress, TrainedTask, seed_for, train_task

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Ground:
    """What a new task stands on: the current generation, or what a new repertoire begins with."""

    current: Manifest | None
    template: PromptTemplate
    first_layer: int
    reference: torch.Tensor  # [M, D]
    frame: Tensors


def add_task(
    repertoire: Repertoire,
    base: BaseModel,
    task: TaskData,
    config: TrainingConfig,
    *,
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
    older_sets = ground.current.experts if ground.current else ()
    older = [{unit.layer: repertoire.read_unit(entry, unit, ref) for unit in entry.units} for entry in older_sets]
    trained = train_task(
        base, rows, older, name=task.name, first_layer=ground.first_layer, config=config, on_progress=on_progress
    )
    own = features(base, [row.prompt for row in rows], ground.first_layer)
    vae, calibration = train_entry(
        ground.frame, own, ground.reference, config, seed=seed_for(config.seed, task.name, "locator")
    )
    experts_blob, expert_set = pack_expert_set(trained.experts, task=task.name, dtype=config.store_dtype, base=ref)
    routers = {router_tensor_name(layer): weight.contiguous() for layer, weight in trained.routers.items()}
    frame_blob, router_blob, vae_blob = save(ground.frame), save(routers), save(vae)
    entry = Task(
        name=task.name,
        experts=expert_set.digest,
        router=RouterRef(
            kind="top_k",
            digest=_sha256(router_blob),
            top_k=trained.top_k,
            visible=(*(entry.digest for entry in older_sets), expert_set.digest),
        ),
        locator=LocatorEntry(
            digest=_sha256(vae_blob), mean=calibration.mean, sd=calibration.sd, threshold=calibration.threshold
        ),
        trained_parameters=_num_parameters(trained, vae),
    )
    manifest = Manifest(
        schema_version=1,
        generation=ground.current.generation + 1 if ground.current else 1,
        parent=ground.current.generation if ground.current else None,
        base=ground.current.base if ground.current else ref,
        prompt_template=ground.template.text,
        first_layer=ground.first_layer,
        locator=ground.current.locator
        if ground.current
        else LocatorRef(
            frame=_sha256(frame_blob), feature="residual_mean", layer=ground.first_layer, score=config.locator_score
        ),
        experts=(*older_sets, expert_set),
        tasks=(*(ground.current.tasks if ground.current else ()), entry),
    )
    blobs = {_sha256(blob): blob for blob in (frame_blob, experts_blob, router_blob, vae_blob)}
    repertoire.publish(manifest, blobs, expected=manifest.parent)
    return manifest


def _stand_on(repertoire: Repertoire, base: BaseModel, name: str, config: TrainingConfig) -> _Ground:
    check_name("task", name)
    if repertoire.head() is None:
        first_layer = base.info.num_layers // 3 if config.first_layer is None else config.first_layer
        if first_layer >= base.info.num_layers:
            raise InvalidInputError("first_layer", first_layer, f"the base has {base.info.num_layers} layers")
        template = default_template(base)
        reference = _reference_features(base, template, first_layer)
        frame = make_frame(reference, seed=seed_for(config.seed, "frame"))
        return _Ground(None, template, first_layer, reference, frame)
    current = repertoire.manifest()
    check_base(current, base.info)
    if name in current.task_names():
        raise InvalidInputError("task", name, f"generation {current.generation} already holds it")
    if config.first_layer not in (None, current.first_layer):
        raise InvalidInputError("first_layer", config.first_layer, f"the repertoire has {current.first_layer}")
    template = PromptTemplate.parse(current.prompt_template)
    reference = _reference_features(base, template, current.locator.layer)
    frame = repertoire.read_tensors(current.locator.frame, frame_shapes(current.base.width))
    return _Ground(current, template, current.first_layer, reference, frame)


def _reference_features(base: BaseModel, template: PromptTemplate, layer: int) -> torch.Tensor:
    return features(base, [template.encode(base.tokenizer, text) for text in reference_prompts()], layer)


def _num_parameters(trained: TrainedTask, vae: Mapping[str, torch.Tensor]) -> int:
    """Parameters of experts, routers and VAE: all that was trained for the task."""
    updates = [update for expert in trained.experts.values() for update in expert.updates.values()]
    tensors = [*(u.a for u in updates), *(u.b for u in updates), *trained.routers.values(), *vae.values()]
    return sum(tensor.numel() for tensor in tensors)


def _sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()
