"""Hyper-adapters in training: attached beside the FFNs of a new mixture, and packed for the repertoire afterwards.

It does not know the optimiser loop: what is attached asks for gradients and is trained with the experts, the base
frozen (HyperMoE, arXiv 2402.12656).
Read first: the reference set is what the task's own router may choose from. It never changes, so a task that arrives
later changes nothing for this one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from safetensors.torch import save

from runtime.model.attach import MixtureFFN
from runtime.model.base import BaseModel
from runtime.model.hyper import HyperSizes
from runtime.model.hyper_module import HyperNetwork, TrainedHyper
from runtime.model.hyper_sets import full_table
from runtime.model.manifest import HyperRef
from training.config import TrainingConfig
from training.seeds import seed_for


def attach_hyper(
    base: BaseModel, ffns: Mapping[int, MixtureFFN], *, name: str, config: TrainingConfig
) -> HyperNetwork | None:
    """Put a fresh hypernetwork beside `ffns`, which then still compute what they did.

    Args:
        base: gives width and device.
        ffns: layer -> mixture; changed.
        name: of the task; enters the seed.
        config: bottleneck and factor; without a bottleneck nothing is done.

    Returns:
        the hypernetwork, or None.
    """
    if config.hyper_bottleneck is None:
        return None
    sizes = HyperSizes(
        width=base.info.width,
        bottleneck=config.hyper_bottleneck,
        factor=config.hyper_factor,
        experts={layer: len(ffn.experts) for layer, ffn in ffns.items()},
    )
    generator = torch.Generator().manual_seed(seed_for(config.seed, name, "hyper"))
    network = HyperNetwork(sizes, generator=generator).to(base.model.device)
    for layer, ffn in ffns.items():
        ffn.beside = TrainedHyper(network, layer)
    return network


def pack_hyper(network: HyperNetwork, *, top_k: int) -> tuple[HyperRef, bytes]:
    """The manifest's record and the blob: the whole table for a top-1 router, else the hypernetwork."""
    weights, sizes = network.weights(), network.sizes
    stored = full_table(weights, sizes) if top_k == 1 else weights
    blob = save(stored)
    ref = HyperRef(
        kind="table" if top_k == 1 else "network",
        digest=hashlib.sha256(blob).hexdigest(),
        bottleneck=sizes.bottleneck,
        factor=sizes.factor,
    )
    return ref, blob
