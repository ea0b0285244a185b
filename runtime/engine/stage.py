"""The stage: the experts and routers of all running mixtures, packed per layer for the step.

It knows nothing of sequences or memory tiers; it is built from mixtures and their reserved experts.
Read first: a layer is packed when a step first enters it, and again only when the set of mixtures there has changed; so
a stage can exist while experts of later layers are still being read. An expert that several mixtures see is packed
once; every mixture keeps its own router columns. Row 0 of `allowed` is the plain base model: it allows no column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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


class LayerPacks:
    """The newest pack of every layer, kept from step to step.

    Args:
        dtype: of the packed experts.
        device: where they live.
    """

    def __init__(self, *, dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        self._dtype = dtype
        self._packs: dict[int, tuple[tuple[str, ...], StagedLayer]] = {}

    def pack(self, layer: int, mixtures: Sequence[tuple[Mixture, FetchExpert]]) -> StagedLayer:
        """The mixtures' experts in this layer, packed in this order; all of them must be in memory."""
        names = tuple(mixture.digest for mixture, _ in mixtures)
        held = self._packs.get(layer)
        if held is not None and held[0] == names:
            return held[1]
        self._packs.pop(layer, None)  # before the next is made: never two of a layer
        made = _stage_layer(layer, mixtures, self._dtype, self.device)
        self._packs[layer] = (names, made)
        return made


class _Layers(Mapping[int, StagedLayer]):
    """Layer -> its pack, made when asked for."""

    def __init__(self, mixtures: Sequence[tuple[Mixture, FetchExpert]], packs: LayerPacks) -> None:
        self._mixtures = mixtures
        self._packs = packs
        self._keys = frozenset(layer for mixture, _ in mixtures for layer in mixture.routers)

    def __getitem__(self, layer: int) -> StagedLayer:
        if layer not in self._keys:
            raise KeyError(layer)
        return self._packs.pack(layer, self._mixtures)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._keys))

    def __len__(self) -> int:
        return len(self._keys)


class Stage:
    """Mixtures that are running in a range of layers.

    Args:
        mixtures: distinct mixtures, each with the way to its reserved experts.
        packs: keeps what is packed.

    `layers` maps a layer to its pack, which is made when it is first asked for.
    """

    def __init__(self, mixtures: Sequence[tuple[Mixture, FetchExpert]], packs: LayerPacks) -> None:
        self.rows = {mixture.digest: 1 + i for i, (mixture, _) in enumerate(mixtures)}
        top_k = [1, *(mixture.top_k for mixture, _ in mixtures)]
        self.top_k = torch.tensor(top_k, device=packs.device)
        self.k_max = max(top_k)
        self.layers: Mapping[int, StagedLayer] = _Layers(mixtures, packs)

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
