"""Arrow routers of experts that came without one: prototypes out of their weights, no training (arXiv 2405.11157).

It does not know repertoires; experts come in as tensors.
Read first: one prototype per expert and layer, of those linears that read the layer's residual stream (q, k, v, gate,
up), since the router reads that too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from runtime.errors import InvalidInputError
from runtime.kernels.arrow import arrow_prototype
from runtime.model.expert import Expert
from runtime.model.manifest import Target

READERS: tuple[Target, ...] = ("q", "k", "v", "gate", "up")


def arrow_routers(sets: Mapping[str, Mapping[int, Expert]], width: int) -> dict[int, torch.Tensor]:
    """Prototypes per layer, [E, D] float32; row j is the j-th of `sets` that has an expert in the layer.

    Args:
        sets: task -> its experts by layer, in the order of the router's rows.
        width: D.

    Raises:
        InvalidInputError: in a layer with several experts, one has no linear that reads the residual stream.
    """
    layers: dict[int, torch.Tensor] = {}
    for layer in sorted({layer for experts in sets.values() for layer in experts}):
        members = [(task, experts[layer]) for task, experts in sets.items() if layer in experts]
        layers[layer] = torch.stack(
            [_prototype(task, expert, width, alone=len(members) == 1) for task, expert in members]
        )
    return layers


def _prototype(task: str, expert: Expert, width: int, *, alone: bool) -> torch.Tensor:
    updates: Sequence[tuple[torch.Tensor, torch.Tensor]] = [
        (expert.updates[target].a, expert.updates[target].b.float() * expert.scale)
        for target in READERS
        if target in expert.updates
    ]
    if updates:
        return arrow_prototype(updates)
    if not alone:
        problem = f"updates {', '.join(expert.updates)} alone in layer {expert.layer}, which gives Arrow no direction"
        raise InvalidInputError("task", task, problem)
    return torch.zeros(width)
