"""What tests of hyper-adapters share: a hypernetwork that adds something, and a repertoire with a task that has one.

It does not know any test.
Read first: generation 3 is generation 2 with hyper-adapters for its second task.
"""

from __future__ import annotations

import hashlib

import torch
from repertoires import Workshop
from safetensors.torch import save

from runtime.model.hyper import HyperSizes, hyper_shapes
from runtime.model.hyper_sets import HyperKind, full_table
from runtime.model.manifest import HyperRef, Manifest


def lively(sizes: HyperSizes, seed: int = 0) -> dict[str, torch.Tensor]:
    """A hypernetwork that adds something: nothing in it is zero."""
    generator = torch.Generator().manual_seed(seed)
    shapes = hyper_shapes(sizes)
    return {name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for name, shape in shapes.items()}


def with_hyper(workshop: Workshop, kind: HyperKind, *, top_k: int) -> tuple[Manifest, dict[str, torch.Tensor]]:
    """Publish two tasks, then once more with hyper-adapters for the second; the first is as it was."""
    workshop.publish("red", "aaaa bbbb cccc", top_k=top_k)
    manifest = workshop.publish("green", "12 34 56 78 90", top_k=top_k)
    visible = manifest.visible_layers(manifest.tasks[1])
    sizes = HyperSizes(
        width=64, bottleneck=8, factor=2, experts={layer: len(found) for layer, found in visible.items()}
    )
    weights = {name: tensor * 0.5 for name, tensor in lively(sizes).items()}
    stored = weights if kind == "network" else full_table(weights, sizes)
    blob = save(stored)
    digest = hashlib.sha256(blob).hexdigest()
    ref = HyperRef(kind=kind, digest=digest, bottleneck=8, factor=2)
    tasks = (manifest.tasks[0], manifest.tasks[1].model_copy(update={"hyper": ref}))
    changed = manifest.model_copy(update={"generation": 3, "parent": 2, "tasks": tasks})
    workshop.repertoire.publish(changed, {**workshop.blobs, digest: blob}, expected=2)
    return changed, weights
