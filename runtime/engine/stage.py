"""The stage: the experts and routers of all running mixtures, packed per layer for the step.

It knows nothing of sequences or memory tiers; it is built from mixtures and their reserved experts.
Read first: it is rebuilt only when the set of mixtures changes. An expert that several mixtures see is packed once;
every mixture keeps its own router columns. Row 0 of `allowed` is the plain base model: it allows no column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from runtime.kernels.mixture import PackedUpdate, pack
from runtime.kernels.routing import top_k_weights
from runtime.model.expert import Expert
from runtime.model.generation import Mixture
from runtime.model.manifest import TARGETS, Target

FetchExpert = Callable[[str, int], Expert]


@dataclass(frozen=True)
class StagedLayer:
    """One layer: C router columns over the packed experts.

    Args:
        router: [C, D] float32.
        allowed: [1 + mixtures, C] bool.
        updates: per target, the packed experts.
        spread: per target [C, sum R] float32, 1 where column c scores the expert that owns rank row r.
    """

    router: torch.Tensor
    allowed: torch.Tensor
    updates: dict[Target, PackedUpdate]
    spread: dict[Target, torch.Tensor]

    def route(self, x: torch.Tensor, rows: torch.Tensor, k: torch.Tensor, k_max: int) -> torch.Tensor:
        """Weights [T, C] of the tokens `x` [T, D]; `rows` [T] names each token's row of `allowed`."""
        return top_k_weights(x.float() @ self.router.t(), self.allowed[rows], k, k_max)


class Stage:
    """Mixtures that are running, packed.

    Args:
        mixtures: distinct mixtures, each with the way to its reserved experts.
        dtype: of the packed experts.
        device: where they live.
    """

    def __init__(
        self, mixtures: Sequence[tuple[Mixture, FetchExpert]], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rows = {mixture.digest: 1 + i for i, (mixture, _) in enumerate(mixtures)}
        self.top_k = torch.tensor([1, *(mixture.top_k for mixture, _ in mixtures)], device=device)
        self.k_max = int(self.top_k.max())
        layers = sorted({layer for mixture, _ in mixtures for layer in mixture.routers})
        self.layers = {layer: _stage_layer(layer, mixtures, dtype, device) for layer in layers}

    def row(self, mixture: Mixture | None) -> int:
        """The row of `allowed` for a mixture, 0 for the plain base model."""
        return 0 if mixture is None else self.rows[mixture.digest]


def _stage_layer(
    layer: int, mixtures: Sequence[tuple[Mixture, FetchExpert]], dtype: torch.dtype, device: torch.device
) -> StagedLayer:
    experts: dict[str, Expert] = {}
    columns: list[str] = []
    weights: list[torch.Tensor] = []
    members: list[tuple[int, int, int]] = []
    for row, (mixture, fetch) in enumerate(mixtures, start=1):
        router = mixture.routers.get(layer)
        if router is None:
            continue
        for digest in router.experts:
            if digest not in experts:
                experts[digest] = fetch(digest, layer)
        members.append((row, len(columns), len(columns) + len(router.experts)))
        columns += router.experts
        weights.append(router.weight)
    allowed = torch.zeros(1 + len(mixtures), len(columns), dtype=torch.bool)
    for row, begin, end in members:
        allowed[row, begin:end] = True
    updates: dict[Target, PackedUpdate] = {}
    spread: dict[Target, torch.Tensor] = {}
    for target in TARGETS:
        owners = [digest for digest, expert in experts.items() if target in expert.updates]
        if not owners:
            continue
        parts = [experts[digest].updates[target] for digest in owners]
        updates[target] = pack(
            [part.a for part in parts],
            [part.b for part in parts],
            [experts[digest].scale for digest in owners],
            dtype=dtype,
            device=device,
        )
        scores = torch.tensor([[float(column == owner) for owner in owners] for column in columns], device=device)
        spread[target] = scores[:, updates[target].owner]
    return StagedLayer(torch.cat(weights).to(device), allowed.to(device), updates, spread)
