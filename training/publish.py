"""Publish a task: fit its locator entry, put it beside everything older, and make that the next generation.

It does not know how experts and routers came about: by training, by import, or out of what is there.
Read first: everything older is carried over as it is, entry by entry and byte by byte; a repertoire with N tasks
becomes one with N + 1, or stays what it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import save

from runtime.errors import InvalidInputError
from runtime.model.base import BaseModel
from runtime.model.generation import base_ref, check_base
from runtime.model.manifest import BaseRef, ExpertSet, Feature, HyperRef, Manifest, Task
from runtime.model.names import check_name
from runtime.model.prompt import PromptTemplate, default_template
from runtime.model.repertoire import Repertoire
from runtime.model.router_record import Group, Grouping, RouterKind, RouterRef
from runtime.model.signature import Signer
from training.config import TrainingConfig
from training.sight import Sight, feature_layer, new_sight, see_task, sha256, sight_of


@dataclass(frozen=True)
class Ground:
    """What a new task stands on: the current generation, or what a new repertoire begins with."""

    current: Manifest | None
    template: PromptTemplate
    first_layer: int
    locator: Sight
    arrival: Sight


def stand_on(repertoire: Repertoire, base: BaseModel, name: str, config: TrainingConfig) -> Ground:
    """What the task `name` will stand on; a repertoire without a generation begins as `config` says.

    Raises:
        InvalidInputError: the repertoire holds a task of this name, or `first_layer` contradicts it or the base.
        BaseMismatchError: the repertoire was made for another base.
        RepertoireError: the repertoire cannot be read.
    """
    check_name("task", name)
    if repertoire.head() is None:
        first_layer = base.info.num_layers // 3 if config.first_layer is None else config.first_layer
        if first_layer >= base.info.num_layers:
            raise InvalidInputError("first_layer", first_layer, f"the base has {base.info.num_layers} layers")
        template = default_template(base)
        chosen = feature_layer(
            config.locator_feature,
            density=config.locator_density,
            first_layer=first_layer,
            num_layers=base.info.num_layers,
        )
        on_arrival: tuple[Feature, int] = ("residual_mean", 0)
        sights = [new_sight(base, template, feature, config) for feature in (chosen, on_arrival)]
        return Ground(None, template, first_layer, *sights)
    current = repertoire.manifest()
    check_base(current, base.info)
    if name in current.task_names():
        raise InvalidInputError("task", name, f"generation {current.generation} already holds it")
    if config.first_layer not in (None, current.first_layer):
        raise InvalidInputError("first_layer", config.first_layer, f"the repertoire has {current.first_layer}")
    template = PromptTemplate.parse(current.prompt_template)
    sights = [sight_of(repertoire, base, template, ref) for ref in (current.locator, current.arrival)]
    return Ground(current, template, current.first_layer, *sights)


@dataclass(frozen=True, kw_only=True)
class NewTask:
    """What is published.

    Args:
        name: of the task.
        prompts: token ids of prompts of the task, for the locator; without any it is never located.
        experts: its own expert set and the bytes of it; None where it brings none.
        router: tensors as in `runtime.model.routers.router_shapes`.
        kind: of the router.
        top_k: K.
        visible: digests of the expert sets that the router may choose from.
        usage: for every layer with visible experts, ascending, the share of the router's weight on each of them; None
            where it was not counted.
        grouping: of a grouped router.
        hyper: its hyper-adapters and the bytes of them; None where it has none.
        trained_parameters: of experts, router and hyper-adapters; those of the locator entry are added.
    """

    name: str
    prompts: Sequence[Sequence[int]]
    experts: tuple[ExpertSet, bytes] | None
    router: Mapping[str, torch.Tensor]
    kind: RouterKind
    top_k: int
    visible: tuple[str, ...]
    usage: tuple[tuple[float, ...], ...] | None = None
    grouping: Grouping | None = None
    hyper: tuple[HyperRef, bytes] | None = None
    trained_parameters: int


def publish_task(
    repertoire: Repertoire,
    base: BaseModel,
    ground: Ground,
    task: NewTask,
    config: TrainingConfig,
    *,
    groups: tuple[Group, ...] | None = None,
    signer: Signer | None = None,
) -> Manifest:
    """Fit the task's locator entry and publish the next generation.

    Args:
        repertoire: whose current generation is `ground.current`.
        base: the frozen base.
        ground: as `stand_on` gave it.
        task: what is added.
        config: the fields `locator_*` and `seed`.
        groups: named groups of expert sets from now on; None keeps what is there.
        signer: signs the new generation; None leaves it unsigned.

    Raises:
        GenerationMismatchError: somebody else published meanwhile.
    """
    current, sights = ground.current, (ground.locator, ground.arrival)
    seen = [see_task(base, task.prompts, sight, config, task.name) for sight in sights]
    router_blob = save({name: tensor.contiguous() for name, tensor in task.router.items()})
    frame_blobs = [blob for sight in sights for blob in sight.blobs()]
    held_sets = current.experts if current else ()
    entry = Task(
        name=task.name,
        experts=task.experts[0].digest if task.experts else None,
        router=RouterRef(
            kind=task.kind,
            digest=sha256(router_blob),
            top_k=task.top_k,
            visible=task.visible,
            grouping=task.grouping,
            usage=task.usage,
        ),
        locator=seen[0].entry,
        arrival=seen[1].entry,
        trained_parameters=task.trained_parameters + sum(each.num_parameters for each in seen),
        hyper=task.hyper[0] if task.hyper else None,
    )
    kept_groups = current.groups if current else ()
    manifest = Manifest(
        schema_version=1,
        generation=current.generation + 1 if current else 1,
        parent=current.generation if current else None,
        base=_base_record(current, base, task),
        prompt_template=ground.template.text,
        first_layer=ground.first_layer,
        locator=current.locator if current else sights[0].ref,
        arrival=current.arrival if current else sights[1].ref,
        experts=(*held_sets, *([task.experts[0]] if task.experts else [])),
        tasks=(*(current.tasks if current else ()), entry),
        groups=kept_groups if groups is None else groups,
    )
    own_blobs = [part[1] for part in (task.experts, task.hyper) if part]
    blobs = [*frame_blobs, *own_blobs, router_blob, *(blob for each in seen for blob in each.blobs)]
    repertoire.publish(manifest, {sha256(blob): blob for blob in blobs}, expected=manifest.parent, signer=signer)
    return manifest


def _base_record(current: Manifest | None, base: BaseModel, task: NewTask) -> BaseRef:
    """The repertoire's own; with the widths of attention where it lacks them, of before experts updated it."""
    ref = base_ref(base.info)
    if current is None:
        return ref
    if current.base.attention_width is None and task.experts is not None:
        return current.base.model_copy(update={"attention_width": ref.attention_width, "kv_width": ref.kv_width})
    return current.base
