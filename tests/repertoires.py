"""A pytest plugin: repertoires with random experts, and a slow reference that answers from them.

It does not know the engine; `reference` attaches the mixture to the Hugging Face model and decodes greedily.
Read first: a task's density is a point, the feature of its prototype prompt; prompts near it are located there.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from runtime.model.attach import attached, fresh_expert, load_mixture
from runtime.model.base import BaseModel
from runtime.model.expert import Expert, pack_expert_set
from runtime.model.generation import base_ref, open_generation, router_tensor_name
from runtime.model.locator import PROJECTED, pool, project, vae_shapes
from runtime.model.manifest import LocatorEntry, LocatorRef, Manifest, RouterRef, Task
from runtime.model.prompt import default_template
from runtime.model.repertoire import Repertoire

FIRST_LAYER = 2


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
    ) -> Manifest:
        """Add a task with random experts in `layers`, by default in every layer from `first_layer` on."""
        number = self.repertoire.head()
        previous = self.repertoire.manifest(number) if number else None
        ref = base_ref(self.base.info)
        generator = torch.Generator().manual_seed(len(self.blobs) + 1)
        experts: dict[int, Expert] = {}
        for layer in range(self.first_layer, ref.num_layers) if layers is None else layers:
            expert = fresh_expert(layer, rank=rank, alpha=2.0 * rank, base=ref, generator=generator)
            for update in expert.updates.values():
                update.b.copy_(torch.randn(update.b.shape, generator=generator) * 0.1)
            experts[layer] = expert
        blob, entry = pack_expert_set(experts, task=name, dtype="float32", base=ref)
        self.blobs[entry.digest] = blob
        visible = (*(e.digest for e in previous.experts), entry.digest) if previous else (entry.digest,)
        sets = (*(previous.experts if previous else ()), entry)
        counts = Counter(unit.layer for expert_set in sets for unit in expert_set.units)
        router = {
            router_tensor_name(layer): torch.randn(count, ref.width, generator=generator)
            for layer, count in sorted(counts.items())
        }
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
            router=RouterRef(kind="top_k", digest=self._blob(router), top_k=min(top_k, len(visible)), visible=visible),
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

    def reference(self, text: str, task: str | None, num_tokens: int, number: int | None = None) -> torch.Tensor:
        """Logits [num_tokens, V] of greedy decoding on the Hugging Face model, one whole forward pass per token."""
        generation = open_generation(self.repertoire, number)
        ids = generation.template.encode(self.base.tokenizer, text)
        model = self.base.model
        ffns = {} if task is None else load_mixture(self.repertoire, generation, task, model)
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
