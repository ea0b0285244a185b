"""HyperMoE: a small adapter made by a hypernetwork from the experts that were not chosen (arXiv 2402.12656).

It does not know routers, tasks or files: sets of chosen experts in, adapters out.
Read first: an adapter depends on the layer and the chosen set alone, never on the token; `runtime.model.hyper_sets`
makes each once and keeps it. Weights are float32 tensors by name, so serving and training run the same formulas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

EXPERT_WIDTH = 128
LAYER_WIDTH = 10

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class HyperSizes:
    """Sizes of a hypernetwork.

    Args:
        width: D.
        bottleneck: b, the width inside an adapter.
        factor: r, the rank of the two matrices that the heads write; they grow with D * r and not with D * b (ours).
        experts: layer -> E, the experts that its router chooses from; the reference set, frozen with the task (ours).
    """

    width: int
    bottleneck: int
    factor: int
    experts: Mapping[int, int]


@dataclass(frozen=True)
class HyperExperts:
    """S adapters: `relu(x D + d) U + u`; down D [S, D, b], down_bias d [S, b], up U [S, b, D], up_bias u [S, D]."""

    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor

    def apply(self, x: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        """`relu(x D_s + d_s) U_s + u_s` with s = which[t]: x [T, D], which [T] int64 -> [T, D] float32."""
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for s in sorted(set(which.tolist())):
            at = (which == s).nonzero()[:, 0]
            hidden = torch.relu(x[at].float() @ self.down[s] + self.down_bias[s])
            y = y.index_copy(0, at, hidden @ self.up[s] + self.up_bias[s])
        return y


def embedding_name(layer: int) -> str:
    """Name of a layer's expert embeddings S [E, 128]."""
    return f"layer.{layer:04d}.experts"


def place_name(layer: int) -> str:
    """Name of a layer's own embedding [10]."""
    return f"layer.{layer:04d}.place"


def hyper_shapes(sizes: HyperSizes) -> dict[str, tuple[int, ...]]:
    """Tensors of a hypernetwork; one for all layers, with embeddings per layer.

    Selection MLP 128-128-128, layer embedding 10, hidden 128 (paper); the heads write `D = left right`, each of rank r.
    """
    D, b, r = sizes.width, sizes.bottleneck, sizes.factor
    linears = {
        "select": (EXPERT_WIDTH, EXPERT_WIDTH),
        "project": (EXPERT_WIDTH, EXPERT_WIDTH),
        "join": (EXPERT_WIDTH, EXPERT_WIDTH + LAYER_WIDTH),
        "down_left": (D * r, EXPERT_WIDTH),
        "down_right": (r * b, EXPERT_WIDTH),
        "down_bias": (b, EXPERT_WIDTH),
        "up_left": (b * r, EXPERT_WIDTH),
        "up_right": (r * D, EXPERT_WIDTH),
        "up_bias": (D, EXPERT_WIDTH),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, num_experts in sizes.experts.items():
        shapes[embedding_name(layer)] = (num_experts, EXPERT_WIDTH)
        shapes[place_name(layer)] = (LAYER_WIDTH,)
    for name, shape in linears.items():
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]
    return shapes


def fresh_hyper(sizes: HyperSizes, *, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A hypernetwork whose adapters add nothing yet: the up-projection's right factor and bias are exactly zero.

    The paper starts all heads near zero; here a head's bias holds a usual start of what it writes, its weight is small,
    and only the last factor is zero, so that the first gradient is not (ours).
    """
    spread = {"down_left": sizes.width**-0.5, "down_right": sizes.factor**-0.5, "up_left": sizes.bottleneck**-0.5}
    weights = {}
    for name, shape in hyper_shapes(sizes).items():
        part, _, kind = name.rpartition(".")
        if part in ("up_right", "up_bias") or (part == "down_bias" and kind == "bias"):
            weights[name] = torch.zeros(shape)
        elif part in spread or part == "down_bias":
            scale = spread.get(part, 1.0) * (1.0 if kind == "bias" else 0.1 * EXPERT_WIDTH**-0.5)
            weights[name] = torch.randn(shape, generator=generator) * scale
        elif kind == "bias":
            weights[name] = torch.zeros(shape)
        elif kind == "weight":
            weights[name] = torch.randn(shape, generator=generator) * (2 / shape[1]) ** 0.5
        else:
            weights[name] = torch.randn(shape, generator=generator)
    return weights


def generate(weights: Weights, sizes: HyperSizes, layer: int, chosen: torch.Tensor) -> HyperExperts:
    """The adapters of S chosen sets in one layer (paper, section 3).

        e = sum of S over the unselected;  h = relu(join [MLP(e), place]);  every matrix and bias is linear in h

    Args:
        weights: tensors as in `hyper_shapes`.
        sizes: of the hypernetwork.
        layer: a key of `sizes.experts`.
        chosen: [S, E] bool, a row per set.
    """
    S, D, b, r = chosen.shape[0], sizes.width, sizes.bottleneck, sizes.factor
    unselected = (~chosen).float() @ weights[embedding_name(layer)]  # [S, 128]
    selection = _linear(weights, "project", torch.relu(_linear(weights, "select", unselected)))
    joined = torch.cat([selection, weights[place_name(layer)].expand(S, -1)], 1)
    hidden = torch.relu(_linear(weights, "join", joined))
    return HyperExperts(
        down=_linear(weights, "down_left", hidden).view(S, D, r) @ _linear(weights, "down_right", hidden).view(S, r, b),
        down_bias=_linear(weights, "down_bias", hidden),
        up=_linear(weights, "up_left", hidden).view(S, b, r) @ _linear(weights, "up_right", hidden).view(S, r, D),
        up_bias=_linear(weights, "up_bias", hidden),
    )


def _linear(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ weights[f"{name}.weight"].t() + weights[f"{name}.bias"]
