"""The locator: which task is a prompt of, or none (LLaVA-CMoE's Probabilistic Task Locator, arXiv 2503.21227).

It knows nothing of how densities are trained (`training.locator`) nor of what a located task entails.
Read first: one small density per task models the features of that task's prompts, and the task that explains a prompt
best wins, unless the background, prompts in general, explains it nearly as well. Adding a task adds an entry and moves
nothing older, because the frame (normalisation and projection) and the background are fixed when a repertoire is
created. Beyond `nearest` tasks only those with the nearest prototypes are asked.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.model.density import (
    LATENT,
    PROJECTED,
    Weights,
    background_error,
    decode,
    narrowest,
    negative_elbo,
    pack,
    raw_error,
    views,
)
from runtime.model.manifest import Density, Feature, LocatorEntry, Score

LEAST_LENGTH = 1e-6
TAIL = 6
"""Tokens at the end of a prompt that are a part of a feature in parts."""
NEAREST = 32
"""Tasks whose densities run for one prompt, at most."""


def pool(residual: torch.Tensor) -> torch.Tensor:
    """Feature of a prompt: mean of the residual stream [T, D] over its tokens, in float32, [D].

    The first token is left out: it is an attention sink of huge norm and equal in all prompts. Pooling over the prompt
    is ours; the paper takes the last token of the last layer, which located worse on the tasks we measured.
    """
    return residual[min(1, residual.shape[0] - 1) :].float().mean(0)


def parts(residual: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
    """Feature of a prompt in three parts, each of which sees what the others do not (ours): [T, D] twice -> [3 D].

    The residual stream's mean over the prompt; its mean over the last tokens, which in a chat are the template's own,
    so that they hold what the base makes of the whole prompt; and the mean of the token embeddings, the words alone.

    Args:
        residual: what enters the layer where the locator reads.
        embedded: what enters the first layer.
    """
    return torch.cat([pool(residual), residual[-TAIL:].float().mean(0), pool(embedded)])


def num_parts(feature: Feature) -> int:
    """How many times D a feature is long."""
    return 3 if feature == "residual_parts" else 1


def projected_width(feature: Feature) -> int:
    """P, the dimensions in which densities see a feature: 256 for each part."""
    return num_parts(feature) * PROJECTED


def frame_shapes(width: int, feature: Feature = "residual_mean") -> dict[str, tuple[int, ...]]:
    """Tensors of the frame blob for a base of `width` = D; a feature in parts has a projection for each."""
    count = num_parts(feature)
    projection = (width, PROJECTED) if count == 1 else (count, width, PROJECTED)
    return {"mean": (count * width,), "deviation": (count * width,), "projection": projection}


def project(frame: Weights, features: torch.Tensor, *, unit_length: bool = False) -> torch.Tensor:
    """`F = ((f - mean) / deviation) P`: [B, D] -> [B, 256] float32; every part by itself, [B, 3 D] -> [B, 768].

    With `unit_length` it is `16 F / |F|`, as long as a normal vector of 256 dimensions mostly is: a mean over few
    tokens lies further out than one over many, and that says nothing of the task (ours; speaker recognition does so
    with its i-vectors, Garcia-Romero and Espy-Wilson, Interspeech 2011).
    """
    normalised, projection = (features.float() - frame["mean"]) / frame["deviation"], frame["projection"]
    if projection.dim() == 3:
        split = normalised.view(-1, *projection.shape[:2])  # [B, 3, D]
        projected = torch.einsum("bpd,pde->bpe", split, projection)  # [B, 3, 256]
    else:
        projected = normalised @ projection
    if unit_length:
        lengths: torch.Tensor = torch.linalg.vector_norm(projected, dim=-1, keepdim=True)
        projected = projected * (math.sqrt(PROJECTED) / lengths.clamp(min=LEAST_LENGTH))
    return projected.flatten(1)


@dataclass(frozen=True)
class Decision:
    """What the locator says of one prompt.

    Args:
        task: the best task, or None where none is near enough.
        margin: score of the second best minus that of the best; 0 with fewer than two tasks.
        scores: (task, score) of all tasks that were asked, best first; lower is nearer.
    """

    task: str | None
    margin: float
    scores: tuple[tuple[str, float], ...]


class Locator:
    """All tasks' densities, stacked.

    Args:
        frame: tensors as in `frame_shapes`.
        entries: task name -> (its density's tensors, its calibration), in order of arrival. The tensors of a VAE are
            `vae_shapes` and, where it is stored, the prototype "mean"; other densities begin with it.
        score: "raw" `e`; "z" `(e - mean) / sd` (the paper's); "abs_z"; "neg_elbo", of VAEs. A signed z can be won by a
            wide VAE.
        density: what the tensors are.
        beta: weight of the KL term in "neg_elbo".
        background: tensors as in `background_shapes`; None takes errors as the densities give them.
        unit_length: see `project`.
        nearest: at most so many densities run for one prompt; with more tasks, those with the nearest prototypes.
    """

    def __init__(
        self,
        frame: Weights,
        entries: Sequence[tuple[str, Weights, LocatorEntry]],
        *,
        score: Score,
        density: Density = "vae",
        beta: float = 1.0,
        background: Weights | None = None,
        unit_length: bool = False,
        nearest: int = NEAREST,
    ) -> None:
        self.frame = frame
        self.tasks = tuple(name for name, _, _ in entries)
        self.score = score
        self.density = density
        self.beta = beta
        self.background = background
        self.unit_length = unit_length
        self.nearest = nearest
        self.means = torch.tensor([entry.mean for _, _, entry in entries])
        self.deviations = torch.tensor([entry.sd for _, _, entry in entries])
        self.thresholds = torch.tensor([entry.threshold for _, _, entry in entries])
        self.width = PROJECTED * (frame["projection"].shape[0] if frame["projection"].dim() == 3 else 1)
        self._rows = narrowest(pack(density, [weights for _, weights, _ in entries])) if entries else torch.zeros(0, 0)
        self._few = self.stacked if len(entries) <= nearest else {}
        self.prototypes = self._prototypes([weights for _, weights, _ in entries])  # [N, P]
        self._squares = self.prototypes.square().sum(1)  # [N]

    def scored_by(self, score: Score) -> Locator:
        """The same densities, compared in another way; shares their memory."""
        other = copy.copy(self)
        other.score = score
        return other

    @property
    def stacked(self) -> Weights:
        """The tensors of all densities, float32, with a leading N; made anew where they are held in float16."""
        return views(self.density, self._rows.float(), self.width) if self.tasks else {}

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Features as the densities see them: [B, D] -> [B, P]."""
        return project(self.frame, features, unit_length=self.unit_length)

    def errors(self, features: torch.Tensor) -> torch.Tensor:
        """Raw errors of all tasks: [B, D] -> [B, N], `raw_error` less that of the background where there is one."""
        return self._errors(self.stacked, self.project(features))

    def scores(self, errors: torch.Tensor) -> torch.Tensor:
        """Raw errors of all tasks -> comparable scores, [B, N]; lower is nearer. Not for "neg_elbo", which needs more.

        Raises:
            ValueError: the score is "neg_elbo".
        """
        if self.score == "neg_elbo":
            raise ValueError("neg_elbo does not follow from the raw errors")
        return self._compare(errors, slice(None))

    def candidates(self, features: torch.Tensor) -> torch.Tensor:
        """The tasks that are asked: [B, D] -> [B, M] indices, `M = min(N, nearest)`, nearest prototype first."""
        return self._nearest(self.project(features))

    def locate(self, features: torch.Tensor) -> list[Decision]:
        """Decide for every row of [B, D]; abstain where the best task's raw error is above its threshold."""
        if not self.tasks:
            return [Decision(None, 0.0, ())] * features.shape[0]
        projected = self.project(features)
        if len(self.tasks) <= self.nearest:
            everything = torch.arange(len(self.tasks))
            scores, errors = self._ask(self._few or self.stacked, projected, everything)
            return [self._decide(row, raw, everything) for row, raw in zip(scores, errors, strict=True)]
        decisions = []
        for row, asked in zip(projected, self._nearest(projected), strict=True):
            scores, errors = self._ask(
                views(self.density, self._rows.index_select(0, asked).float(), self.width), row.unsqueeze(0), asked
            )
            decisions.append(self._decide(scores[0], errors[0], asked))
        return decisions

    def _nearest(self, projected: torch.Tensor) -> torch.Tensor:
        """`candidates` of projected features; the length of F is the same to all, so distances leave it out."""
        distances = torch.addmm(self._squares, projected, self.prototypes.t(), alpha=-2)
        return distances.topk(min(self.nearest, len(self.tasks)), dim=1, largest=False).indices

    def _ask(self, weights: Weights, projected: torch.Tensor, asked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and raw errors [B, M] of the tasks `asked`, whose tensors are `weights`."""
        errors = self._errors(weights, projected)
        if self.score == "neg_elbo":
            return negative_elbo(weights, projected, self.beta), errors
        return self._compare(errors, asked), errors

    def _errors(self, weights: Weights, projected: torch.Tensor) -> torch.Tensor:
        errors = raw_error(self.density, weights, projected)
        return errors if self.background is None else errors - background_error(self.background, projected)

    def _compare(self, errors: torch.Tensor, asked: torch.Tensor | slice) -> torch.Tensor:
        if self.score == "raw":
            return errors
        z = (errors - self.means[asked]) / self.deviations[asked]
        return z.abs() if self.score == "abs_z" else z

    def _decide(self, scores: torch.Tensor, errors: torch.Tensor, asked: torch.Tensor) -> Decision:
        values, order = (part.tolist() for part in scores.sort())
        tasks = asked.tolist()
        best = order[0]
        near = math.isfinite(values[0]) and float(errors[best]) <= float(self.thresholds[tasks[best]])
        return Decision(
            task=self.tasks[tasks[best]] if near else None,
            margin=values[1] - values[0] if len(values) > 1 else 0.0,
            scores=tuple((self.tasks[tasks[i]], value) for i, value in zip(order, values, strict=True)),
        )

    def _prototypes(self, tensors: Sequence[Weights]) -> torch.Tensor:
        """Stored means; where a VAE has none, what it decodes from the middle of its latent space."""
        if not tensors:
            return torch.zeros(0, self.width)
        if all("mean" in weights for weights in tensors):
            return torch.stack([weights["mean"] for weights in tensors])
        middle = decode(self.stacked, torch.zeros(len(tensors), 1, LATENT))[:, 0]
        return torch.stack([weights.get("mean", row) for weights, row in zip(tensors, middle, strict=True)])
