"""The mixtures that training attaches: old experts frozen, new ones trainable, a fresh router over both.

It does not know data, losses or why a layer gets a new expert.
Read first: a layer's columns are the old experts that have this layer, in the order of their arrival, then the new one
if the layer gets one; a layer in which nothing is visible has no mixture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from runtime.model.attach import ExpertModule, MixtureFFN, decoder_layers, fresh_expert
from runtime.model.base import BaseModel
from runtime.model.expert import Expert, LowRank
from runtime.model.generation import base_ref
from training.config import TrainingConfig
from training.seeds import seed_for

_ROUTER_INIT = 0.02  # standard deviation: small enough that every expert begins with a like weight (ours)


def fresh_experts(
    base: BaseModel, layers: Iterable[int], config: TrainingConfig, *, seed_name: str
) -> dict[int, Expert]:
    """New experts that change nothing yet, one per layer; a layer's does not depend on which others are asked for."""
    ref = base_ref(base.info)
    experts = {}
    for layer in layers:
        generator = torch.Generator().manual_seed(seed_for(config.seed, seed_name, "expert", str(layer)))
        experts[layer] = fresh_expert(layer, rank=config.rank, alpha=config.alpha, base=ref, generator=generator)
    return experts


def copied_expert(source: Expert, *, scale: float) -> Expert:
    """The same update written with another scale: B takes what the scale gives away, so `scale * B A` stays."""
    updates = {
        target: LowRank(update.a.float().clone(), update.b.float() * (source.scale / scale))
        for target, update in source.updates.items()
    }
    return Expert(layer=source.layer, scale=scale, updates=updates)


def new_mixture(
    base: BaseModel,
    older: Sequence[Mapping[int, Expert]],
    new: Mapping[int, Expert],
    *,
    name: str,
    first_layer: int,
    config: TrainingConfig,
) -> dict[int, MixtureFFN]:
    """Mixtures of all layers from `first_layer` on in which something is visible; `base` is not changed.

    Args:
        base: gives the FFNs and the device.
        older: visible expert sets, each layer -> expert; frozen.
        new: layer -> where its new expert begins; trainable, last column of its layer.
        name: enters the seeds of the routers.
        first_layer: lowest layer with a mixture.
        config: top_k and seed.
    """
    device, layers = base.model.device, decoder_layers(base.model)
    ffns = {}
    for layer in range(first_layer, base.info.num_layers):
        modules = [ExpertModule(experts[layer], trainable=False) for experts in older if layer in experts]
        if layer in new:
            modules.append(ExpertModule(new[layer], trainable=True))
        if not modules:
            continue
        generator = torch.Generator().manual_seed(seed_for(config.seed, name, "router", str(layer)))
        router = torch.randn(len(modules), base.info.width, generator=generator) * _ROUTER_INIT
        ffns[layer] = MixtureFFN(
            layers[layer].mlp,  # type: ignore[arg-type]
            [module.to(device) for module in modules],
            nn.Parameter(router.to(device)),
            top_k=min(config.top_k, len(modules)),
        )
    return ffns


def cosine(one: Expert, other: Expert) -> float:
    """Cosine of two updates as matrices, `<D1, D2> / (|D1| |D2|)` with `D = B A` of all targets; 0 where one is zero.

    `<B1 A1, B2 A2> = sum((B1^T B2) * (A1 A2^T))`, so no full matrix is made. What the paper logs of a copied expert;
    over updates and not over A and B, which many factorisations share (ours).
    """
    norms = _inner(one, one) * _inner(other, other)
    return 0.0 if norms == 0 else _inner(one, other) / norms**0.5


def _inner(one: Expert, other: Expert) -> float:
    total = 0.0
    for target in one.updates.keys() & other.updates.keys():
        left, right = one.updates[target], other.updates[target]
        a = left.a.double() @ right.a.double().t()
        b = left.b.double().t() @ right.b.double()
        total += float((a * b).sum())
    return total
