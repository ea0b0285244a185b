"""A repertoire of many synthetic tasks on a real base: random experts, and densities that are points.

It knows nothing of what is measured.
Read first: task i sees only its own experts unless asked otherwise, and is located exactly at the prompt
`prompt_of(i)`. Answers are nonsense; bytes, reads and arithmetic are those of trained experts of the same rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

from runtime.model.attach import fresh_expert
from runtime.model.base import BaseModel
from runtime.model.density import PROJECTED, vae_shapes
from runtime.model.expert import pack_expert_set
from runtime.model.generation import base_ref
from runtime.model.locator import frame_shapes, project
from runtime.model.manifest import ExpertSet, LocatorEntry, LocatorRef, Manifest, Task
from runtime.model.prompt import default_template
from runtime.model.repertoire import Repertoire
from runtime.model.router_record import RouterRef
from runtime.model.routers import router_tensor_name
from training.features import features

_SUBJECTS = ("rivers", "bridges", "violins", "engines", "gardens", "stars", "coins", "maps", "clocks", "sails")


def prompt_of(task: int) -> str:
    """A prompt that is located at this task."""
    return f"Report {task:04d}: say something short about {_SUBJECTS[task % 10]} and {_SUBJECTS[task // 10 % 10]}."


def name_of(task: int) -> str:
    """The name of the task."""
    return f"task-{task:04d}"


def make_repertoire(
    root: Path,
    base: BaseModel,
    num_tasks: int,
    *,
    rank: int,
    locate: bool,
    see_all: bool = False,
    prompt: Callable[[int], str] = prompt_of,
) -> Repertoire:
    """Publish generation 1 with `num_tasks` tasks; does nothing if it is there.

    Args:
        root: folder.
        base: the real base.
        num_tasks: tasks.
        rank: R of every expert.
        locate: give every task a density at its prompt; otherwise tasks must be pinned.
        see_all: every task sees all tasks' experts, two per token; otherwise its own alone.
        prompt: where a task's density is.
    """
    repertoire = Repertoire(root)
    if repertoire.head() is not None:
        return repertoire
    ref, template = base_ref(base.info), default_template(base)
    first_layer = ref.num_layers // 3
    generator = torch.Generator().manual_seed(0)
    blobs: dict[str, bytes] = {}

    def blob(tensors: dict[str, torch.Tensor]) -> str:
        data = save(tensors)
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return digest

    shapes = frame_shapes(ref.width)
    frame = {"mean": torch.zeros(shapes["mean"]), "deviation": torch.ones(shapes["deviation"])}
    frame["projection"] = torch.randn(ref.width, PROJECTED, generator=generator) / ref.width**0.5
    prompts = [template.encode(base.tokenizer, prompt(task)) for task in range(num_tasks if locate else 1)]
    points = {layer: project(frame, features(base, prompts, layer)) for layer in (first_layer, 0)}
    sets: list[ExpertSet] = []
    tasks: list[Task] = []
    for task in range(num_tasks):
        experts = {}
        for layer in range(first_layer, ref.num_layers):
            expert = fresh_expert(layer, rank=rank, alpha=2.0 * rank, base=ref, generator=generator)
            for update in expert.updates.values():
                update.b.normal_(std=0.01, generator=generator)
            experts[layer] = expert
        data, entry = pack_expert_set(experts, task=name_of(task), dtype="bfloat16", base=ref)
        blobs[entry.digest] = data
        sets.append(entry)
    for task in range(num_tasks):
        visible = tuple(entry.digest for entry in sets) if see_all else (sets[task].digest,)
        router = {}
        for layer in range(first_layer, ref.num_layers):
            scores = torch.randn(len(visible), ref.width, generator=generator)
            router[router_tensor_name(layer)] = scores if see_all else scores * 0
        entries = []
        for layer in (first_layer, 0):
            vae = {name: torch.zeros(shape) for name, shape in vae_shapes().items()}
            vae["output.bias"] = points[layer][task if locate else 0].clone()
            entries.append(LocatorEntry(digest=blob(vae), mean=0.0, sd=1.0, threshold=1e9))
        tasks.append(
            Task(
                name=name_of(task),
                experts=sets[task].digest,
                router=RouterRef(kind="top_k", digest=blob(router), top_k=min(2, len(visible)), visible=visible),
                locator=entries[0],
                arrival=entries[1],
                trained_parameters=0,
            )
        )
    frame_digest = blob(frame)
    refs = [LocatorRef(frame=frame_digest, feature="residual_mean", layer=n, score="raw") for n in (first_layer, 0)]
    manifest = Manifest(
        schema_version=1,
        generation=1,
        parent=None,
        base=ref,
        prompt_template=template.text,
        first_layer=first_layer,
        locator=refs[0],
        arrival=refs[1],
        experts=tuple(sets),
        tasks=tuple(tasks),
    )
    repertoire.publish(manifest, blobs, expected=None)
    return repertoire
