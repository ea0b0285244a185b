"""Densities of prompt features: what one task's prompts look like in the locator's projected space.

It knows nothing of tasks by name, thresholds or decisions (`runtime.model.locator`).
Read first: a density's tensors lie one after the other in one row, so that the rows of a few tasks out of thousands
are gathered in one copy; `views` gives them their names and shapes back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from runtime.model.manifest import Density

PROJECTED = 256
"""Dimensions of one part of a feature, after the frame; a feature of three parts has as many again for each."""

HIDDEN = 64
LATENT = 16
RANK = 32

Weights = Mapping[str, torch.Tensor]


def vae_shapes() -> dict[str, tuple[int, ...]]:
    """Tensors of a task's VAE: 256-64-16-64-256, 36,000 parameters (ours; the paper gives no sizes)."""
    return {
        "encode.weight": (HIDDEN, PROJECTED),
        "encode.bias": (HIDDEN,),
        "mu.weight": (LATENT, HIDDEN),
        "mu.bias": (LATENT,),
        "log_variance.weight": (LATENT, HIDDEN),
        "log_variance.bias": (LATENT,),
        "decode.weight": (HIDDEN, LATENT),
        "decode.bias": (HIDDEN,),
        "output.weight": (PROJECTED, HIDDEN),
        "output.bias": (PROJECTED,),
    }


def prototype_shapes(width: int = PROJECTED) -> dict[str, tuple[int, ...]]:
    """Tensors of a prototype: the mean of a task's projected features, which is also all of a "gaussian" density."""
    return {"mean": (width,)}


def low_rank_shapes(width: int = PROJECTED) -> dict[str, tuple[int, ...]]:
    """Tensors of a Gaussian with a covariance of its own.

    The mean; 32 orthonormal directions in which the task varies most, seen against the reference; as gains, 1/rest
    minus 1/variance of each; as precision, 1/rest for all other directions; as volume, the log-determinant.
    """
    return {"mean": (width,), "directions": (RANK, width), "gains": (RANK,), "precision": (1,), "volume": (1,)}


def background_shapes(width: int = PROJECTED) -> dict[str, tuple[int, ...]]:
    """Tensors of the background: a Gaussian with independent dimensions.

    Its mean; as precision, 1/variance of each dimension; as volume, the log-determinant.
    """
    return {"mean": (width,), "precision": (width,), "volume": (1,)}


def density_shapes(density: Density, width: int = PROJECTED) -> dict[str, tuple[int, ...]]:
    """Tensors of one task's density over `width` projected dimensions; a VAE has 256 in any case."""
    return (
        vae_shapes()
        if density == "vae"
        else {"gaussian": prototype_shapes, "low_rank": low_rank_shapes}[density](width)
    )


def pack(density: Density, entries: Sequence[Weights]) -> torch.Tensor:
    """One row of numbers per density, [N, P], tensors in the order of `density_shapes`."""
    return torch.stack([torch.cat([entry[name].flatten() for name in density_shapes(density)]) for entry in entries])


def narrowest(rows: torch.Tensor) -> torch.Tensor:
    """`rows` in float16 where that loses nothing, in half the memory; else as they are."""
    half = rows.half()
    return half if torch.equal(half.float(), rows) else rows


def views(density: Density, rows: torch.Tensor, width: int = PROJECTED) -> dict[str, torch.Tensor]:
    """The tensors of the densities in [N, P], each with a leading N; they share memory with `rows`."""
    found: dict[str, torch.Tensor] = {}
    start = 0
    for name, shape in density_shapes(density, width).items():
        size = math.prod(shape)
        found[name] = rows[:, start : start + size].view(-1, *shape)
        start += size
    return found


def raw_error(density: Density, weights: Weights, projected: torch.Tensor) -> torch.Tensor:
    """The error that tells whether a prompt is of a task, lower is nearer: [B, P] -> [B, N]."""
    if density == "vae":
        return reconstruction_error(weights, projected)
    if density == "gaussian":
        return squared_distance(weights["mean"], projected)
    return surprise(weights, projected)


def _linear(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.baddbmm(weights[f"{name}.bias"].unsqueeze(1), x, weights[f"{name}.weight"].transpose(1, 2))


def encode(weights: Weights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and log-variance of the latent: [N, B, 256] -> 2 x [N, B, 16]; all weights carry a leading N."""
    hidden = torch.relu(_linear(weights, "encode", x))
    return _linear(weights, "mu", hidden), _linear(weights, "log_variance", hidden)


def decode(weights: Weights, latent: torch.Tensor) -> torch.Tensor:
    """Return the reconstruction F': [N, B, 16] -> [N, B, 256]."""
    return _linear(weights, "output", torch.relu(_linear(weights, "decode", latent)))


def reconstruction_error(weights: Weights, projected: torch.Tensor) -> torch.Tensor:
    """`e[b, n] = mean (F_b - F'_{b,n})^2`, decoding the latent mean: [B, 256] -> [B, N]."""
    return _reconstruct(weights, projected)[0]


def negative_elbo(weights: Weights, projected: torch.Tensor, beta: float) -> torch.Tensor:
    """`(|F - F'|^2 + beta * KL(q(z|F) || N(0, 1))) / 256`, the training loss at the latent mean: [B, 256] -> [B, N]."""
    error, mean, log_variance = _reconstruct(weights, projected)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(2)
    return error + beta * divergence.t() / PROJECTED


def squared_distance(means: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
    """`e[b, n] = mean (F_b - m_n)^2`: [N, P] and [B, P] -> [B, N].

    In a whitened space it is the squared Mahalanobis distance over P: the error of a Gaussian with the shared
    covariance.
    """
    products = torch.addmm(means.square().sum(1).unsqueeze(0), projected, means.t(), alpha=-2)
    return (products + projected.square().sum(1, keepdim=True)).clamp(min=0) / projected.shape[1]


def surprise(weights: Weights, projected: torch.Tensor) -> torch.Tensor:
    """`e[b, n] = (|d|^2 / rest - sum_r gain_r * (v_r . d)^2 + log det C_n) / P`, `d = F_b - m_n`.

    Twice the negative log-likelihood over P, but for a constant, of a Gaussian whose covariance C has the variances
    of `low_rank_shapes` along its directions v and `rest` elsewhere (ours): [B, P] -> [B, N].
    """
    means, directions = weights["mean"], weights["directions"]  # [N, P], [N, R, P]
    if projected.shape[0] == 1:  # read once and copied nowhere: the way of a prompt that is served
        offsets = projected - means
        along = torch.stack([own.mv(offset) for own, offset in zip(directions, offsets, strict=True)]).unsqueeze(0)
    else:
        along = projected @ directions.flatten(0, 1).t()  # [B, N * R]
        along = along.view(-1, *directions.shape[:2]) - torch.einsum("nrp,np->nr", directions, means)
    inside = (along.square() * weights["gains"]).sum(2)
    distance = projected.shape[1] * squared_distance(means, projected) * weights["precision"][:, 0]
    total: torch.Tensor = distance - inside + weights["volume"][:, 0]
    return total / projected.shape[1]


def background_error(background: Weights, projected: torch.Tensor) -> torch.Tensor:
    """`b = (sum_i precision_i * (F_i - m_i)^2 + log det) / P`: [B, P] -> [B, 1].

    In the unit of `surprise`, so that `surprise - b` is twice the log of how much likelier the prompt is among prompts
    in general than among those of the task, over P: a likelihood ratio (ours; Ren et al., arXiv 2106.09022, do so
    with Mahalanobis distances). What makes a prompt unusual wherever it comes from drops out of it.
    """
    distance = (projected - background["mean"]).square() @ background["precision"].unsqueeze(1)
    total: torch.Tensor = (distance + background["volume"]) / projected.shape[1]
    return total


def _reconstruct(weights: Weights, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    count = weights["encode.bias"].shape[0]
    x = projected.unsqueeze(0).expand(count, -1, -1)
    mean, log_variance = encode(weights, x)
    return (x - decode(weights, mean)).square().mean(2).t(), mean, log_variance
