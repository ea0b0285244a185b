"""A pytest plugin: repertoires with random experts, and a slow reference that answers from them.

It does not know the engine; `reference` attaches the mixture to the Hugging Face model and decodes greedily.
Read first: a task's density is a point, the feature of its prototype prompt; prompts near it are located there.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import save

from runtime.model.attach import attached, fresh_expert, hold_mixture
from runtime.model.base import BaseModel
from runtime.model.control import controlled, fixed_for, summary
from runtime.model.density import PROJECTED, vae_shapes
from runtime.model.expert import Expert, pack_expert_set
from runtime.model.generation import base_ref, open_generation
from runtime.model.locator import pool, project
from runtime.model.manifest import FFN_TARGETS, LocatorEntry, LocatorRef, Manifest, Target, Task
from runtime.model.mixture import Mixture
from runtime.model.prompt import default_template
from runtime.model.repertoire import Repertoire
from runtime.model.router_record import Grouping, RouterRef
from runtime.model.routers import router_tensor_name

FIRST_LAYER = 2

GROUPING = {"scope": "token", "within": "input", "tau_group": 0.7, "tau_expert": 1.5, "epsilon": 0.0, "share": 1.0}


def random_grouping(
    grouping: Grouping, counts: Mapping[int, int], width: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Tensors of a grouped router for `counts` visible experts per layer; sizes that do not make it choose sharply."""
    tensors = {}
    for layer, count in sorted(counts.items()):
        if grouping.within == "input":
            tensors[router_tensor_name(layer)] = torch.randn(count, width, generator=generator) * 0.1
        else:
            tensors[router_tensor_name(layer, "logits")] = torch.randn(count, generator=generator)
        names = len(grouping.names())
        tensors[router_tensor_name(layer, "group.weight")] = torch.randn(names, width, generator=generator) * 0.1
        tensors[router_tensor_name(layer, "group.bias")] = torch.randn(names, generator=generator)
    return tensors


@dataclass
class Workshop:
    """Publishes tasks with random experts on one base."""

    base: BaseModel
    repertoire: Repertoire
    blobs: dict[str, bytes] = field(default_factory=dict)
    first_layer: int = FIRST_LAYER

    def _blob(self, tensors: dict[str, torch.Tensor]) -> str:
        data = save(tensors)
        digest = hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return digest

    def residual(self, text: str, layer: int | None = None) -> torch.Tensor:
        """[T, D]: what enters a layer for a prompt, by default the first layer with experts."""
        ids = default_template(self.base).encode(self.base.tokenizer, text)
        with torch.no_grad():
            output = self.base.model(torch.tensor([ids]), output_hidden_states=True)
        return output.hidden_states[self.first_layer if layer is None else layer][0]

    def publish(
        self,
        name: str,
        prototype: str,
        *,
        rank: int = 4,
        top_k: int = 2,
        threshold: float = 1e9,
        layers: Sequence[int] | None = None,
        targets: Sequence[Target] = FFN_TARGETS,
        kind: Literal["top_k", "arrow"] = "top_k",
        grouping: Mapping[str, object] | None = None,
    ) -> Manifest:
        """Add a task with random experts in `layers`, by default in every layer from `first_layer` on.

        With `grouping` its router is grouped: `groups` are those of the visible sets, other fields as in `GROUPING`;
        the oldest expert set is the general one if `share` is below 1.
        """
        number = self.repertoire.head()
        previous = self.repertoire.manifest(number) if number else None
        ref = base_ref(self.base.info)
        generator = torch.Generator().manual_seed(len(self.blobs) + 1)
        experts: dict[int, Expert] = {}
        for layer in range(self.first_layer, ref.num_layers) if layers is None else layers:
            expert = fresh_expert(layer, rank=rank, alpha=2.0 * rank, base=ref, generator=generator, targets=targets)
            for update in expert.updates.values():
                update.b.copy_(torch.randn(update.b.shape, generator=generator) * 0.1)
            experts[layer] = expert
        blob, entry = pack_expert_set(experts, task=name, dtype="float32", base=ref)
        self.blobs[entry.digest] = blob
        visible = (*(e.digest for e in previous.experts), entry.digest) if previous else (entry.digest,)
        sets = (*(previous.experts if previous else ()), entry)
        general = sets[0].digest if grouping is not None and grouping.get("share", 1.0) != 1.0 else None
        visible = tuple(digest for digest in visible if digest != general)
        counts = Counter(unit.layer for e in sets if e.digest != general for unit in e.units)
        router = {
            router_tensor_name(layer): torch.randn(count, ref.width, generator=generator)
            for layer, count in sorted(counts.items())
        }

        def ref_of(visible: tuple[str, ...]) -> RouterRef:
            if grouping is None:
                k = min(top_k, len(visible))
                return RouterRef(kind=kind, digest=self._blob(router), top_k=k, visible=visible)
            made = Grouping(**{**GROUPING, **grouping, "general": general})
            grouped = random_grouping(made, counts, ref.width, generator)
            digest = self._blob(grouped)
            return RouterRef(kind="grouped", digest=digest, top_k=len(visible), visible=visible, grouping=made)

        width = ref.width
        frame = {
            "mean": torch.zeros(width),
            "deviation": torch.ones(width),
            "projection": torch.eye(width, PROJECTED),
        }
        vae = {key: torch.zeros(shape) for key, shape in vae_shapes().items()}
        vae["output.bias"] = project(frame, pool(self.residual(prototype)).unsqueeze(0))[0]
        arrival = {key: torch.zeros(shape) for key, shape in vae_shapes().items()}
        arrival["output.bias"] = project(frame, pool(self.residual(prototype, 0)).unsqueeze(0))[0]
        entries = [
            LocatorEntry(digest=self._blob(tensors), mean=0.0, sd=1.0, threshold=threshold)
            for tensors in (vae, arrival)
        ]
        task = Task(
            name=name,
            experts=entry.digest,
            router=ref_of(visible),
            locator=entries[0],
            arrival=entries[1],
            trained_parameters=0,
        )
        locator, guess = (
            LocatorRef(frame=self._blob(frame), feature="residual_mean", layer=layer, score="raw")
            for layer in (self.first_layer, 0)
        )
        manifest = Manifest(
            schema_version=1,
            generation=(number or 0) + 1,
            parent=number,
            base=ref,
            prompt_template=default_template(self.base).text,
            first_layer=self.first_layer,
            locator=locator,
            arrival=guess,
            experts=sets,
            tasks=(*(previous.tasks if previous else ()), task),
        )
        self.repertoire.publish(manifest, self.blobs, expected=number)
        return manifest

    def mixture(
        self, text: str, task: str, number: int | None = None, *, bias: Mapping[str, float], mask: Sequence[str]
    ) -> Mixture:
        """What the groups' bias and mask, and the prompt, make of a task's mixture."""
        mixture = controlled(open_generation(self.repertoire, number).mixture(task), bias, mask)
        return fixed_for(mixture, summary(self.residual(text)))

    def reference(
        self,
        text: str,
        task: str | None,
        num_tokens: int,
        number: int | None = None,
        *,
        group_bias: Mapping[str, float] | None = None,
        group_mask: Sequence[str] = (),
    ) -> torch.Tensor:
        """Logits [num_tokens, V] of greedy decoding on the Hugging Face model, one whole forward pass per token."""
        generation = open_generation(self.repertoire, number)
        ids = generation.template.encode(self.base.tokenizer, text)
        model = self.base.model
        ffns = {}
        if task is not None:
            mixture = self.mixture(text, task, number, bias=group_bias or {}, mask=group_mask)
            ffns = hold_mixture(self.repertoire, generation, mixture, model)
        rows = []
        with attached(model, ffns), torch.no_grad():
            for _ in range(num_tokens):
                rows.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1])
                ids = [*ids, int(rows[-1].argmax())]
        return torch.stack(rows)


@pytest.fixture
def workshop(tmp_path: Path, tiny_base: BaseModel) -> Workshop:
    """An empty repertoire on the tiny base."""
    return Workshop(tiny_base, Repertoire(tmp_path / "repertoire"))


PROTOTYPES = {"red": "aaaa bbbb cccc", "green": "12 34 56 78 90", "blue": "? ! ? ! ? ! ? !"}


@pytest.fixture
def three_tasks(workshop: Workshop) -> Workshop:
    """Generations 1, 2, 3 with the tasks red, green and blue, of different ranks."""
    for rank, (name, prototype) in zip((4, 2, 8), PROTOTYPES.items(), strict=True):
        workshop.publish(name, prototype, rank=rank)
    return workshop


@pytest.fixture
def prototypes() -> dict[str, str]:
    """For each of the three tasks a prompt that is located there."""
    return dict(PROTOTYPES)
