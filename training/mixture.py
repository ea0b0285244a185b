"""A stored task's mixture as modules on a Hugging Face model: for training on top of it and for checking it.

It does not know optimisers, data or engines; serving has its own path in `runtime.engine`.
Read first: `attached` is the way to run a model with a mixture; the model is bit for bit the old one afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from runtime.model.attach import ExpertModule, MixtureFFN, attach, decoder_layers, detach
from runtime.model.generation import Generation
from runtime.model.repertoire import Repertoire


@contextmanager
def attached(model: nn.Module, ffns: Mapping[int, MixtureFFN]) -> Iterator[None]:
    """`model` with the mixtures in the place of its FFNs, and without them again on leaving, whatever happens."""
    attach(model, ffns)
    try:
        yield
    finally:
        detach(model)


def load_mixture(repertoire: Repertoire, generation: Generation, task: str, model: nn.Module) -> dict[int, MixtureFFN]:
    """Read router and experts of a task, frozen, as FFNs around those of `model`; `model` itself is not changed.

    Raises:
        UnknownTaskError: no such task.
        RepertoireError: something of the task cannot be read.
    """
    mixture = generation.mixture(task)
    base = generation.manifest.base
    device = next(model.parameters()).device
    modules = {
        (entry.digest, unit.layer): ExpertModule(repertoire.read_unit(entry, unit, base), trainable=False).to(device)
        for entry, unit in generation.visible_units(mixture)
    }
    layers = decoder_layers(model)
    return {
        layer: MixtureFFN(
            layers[layer].mlp,  # type: ignore[arg-type]
            [modules[digest, layer] for digest in router.experts],
            router.weight.to(device),
            top_k=mixture.top_k,
        )
        for layer, router in mixture.routers.items()
    }
