"""The locator: which task is a prompt of, or none (LLaVA-CMoE's Probabilistic Task Locator, arXiv 2503.21227).

It knows nothing of how densities are trained (`training.locator`) nor of what a located task entails.
Read first: one small VAE per task models the features of that task's prompts; all run in one batched matmul, and the
task that reconstructs a prompt best wins. Adding a task adds an entry and moves nothing older, because the frame
(normalisation and random projection) is fixed when a repertoire is created.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from runtime.model.manifest import LocatorEntry

PROJECTED = 256
HIDDEN = 64
LATENT = 16

Weights = Mapping[str, torch.Tensor]


def pool(residual: torch.Tensor) -> torch.Tensor:
    """Feature of a prompt: mean of the residual stream [T, D] over its tokens, in float32, [D].

    The first token is left out: it is an attention sink of huge norm and equal in all prompts. Pooling over the prompt
    is ours; the paper takes the last token of the last layer, which located worse on the tasks we measured.
    """
    return residual[min(1, residual.shape[0] - 1) :].float().mean(0)


def frame_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Tensors of the frame blob for features of `width` = D."""
    return {"mean": (width,), "deviation": (width,), "projection": (width, PROJECTED)}


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


def project(frame: Weights, features: torch.Tensor) -> torch.Tensor:
    """`F = ((f - mean) / deviation) P`: [B, D] -> [B, 256] float32."""
    return ((features.float() - frame["mean"]) / frame["deviation"]) @ frame["projection"]


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
    count = weights["encode.bias"].shape[0]
    x = projected.unsqueeze(0).expand(count, -1, -1)
    mean, _ = encode(weights, x)
    return (x - decode(weights, mean)).square().mean(2).t()


@dataclass(frozen=True)
class Decision:
    """What the locator says of one prompt.

    Args:
        task: the best task, or None where none is near enough.
        margin: score of the second best minus that of the best; 0 with fewer than two tasks.
        scores: (task, score) of all tasks, best first; lower is nearer.
    """

    task: str | None
    margin: float
    scores: tuple[tuple[str, float], ...]


class Locator:
    """All tasks' densities, stacked.

    Args:
        frame: tensors as in `frame_shapes`.
        entries: task name -> (its VAE's tensors, its calibration), in order of arrival.
        score: "raw" `e`, "z" `(e - mean) / sd` (the paper's), or "abs_z"; a signed z can be won by a wide VAE.
    """

    def __init__(self, frame: Weights, entries: Sequence[tuple[str, Weights, LocatorEntry]], *, score: str) -> None:
        self.frame = frame
        self.tasks = tuple(name for name, _, _ in entries)
        self.score = score
        self.stacked = (
            {name: torch.stack([weights[name] for _, weights, _ in entries]) for name in vae_shapes()}
            if entries
            else {}
        )
        self.means = torch.tensor([entry.mean for _, _, entry in entries])
        self.deviations = torch.tensor([entry.sd for _, _, entry in entries])
        self.thresholds = torch.tensor([entry.threshold for _, _, entry in entries])

    def errors(self, features: torch.Tensor) -> torch.Tensor:
        """Raw reconstruction errors: [B, D] -> [B, N]."""
        return reconstruction_error(self.stacked, project(self.frame, features))

    def scores(self, errors: torch.Tensor) -> torch.Tensor:
        """Errors -> comparable scores, [B, N]; lower is nearer."""
        if self.score == "raw":
            return errors
        z = (errors - self.means) / self.deviations
        return z.abs() if self.score == "abs_z" else z

    def locate(self, features: torch.Tensor) -> list[Decision]:
        """Decide for every row of [B, D]; abstain where the best task's raw error is above its threshold."""
        if not self.tasks:
            return [Decision(None, 0.0, ())] * features.shape[0]
        errors = self.errors(features)
        decisions = []
        for row, raw in zip(self.scores(errors), errors, strict=True):
            values, order = (part.tolist() for part in row.sort())
            near = math.isfinite(values[0]) and float(raw[order[0]]) <= float(self.thresholds[order[0]])
            decisions.append(
                Decision(
                    task=self.tasks[order[0]] if near else None,
                    margin=values[1] - values[0] if len(values) > 1 else 0.0,
                    scores=tuple((self.tasks[i], value) for i, value in zip(order, values, strict=True)),
                )
            )
        return decisions
