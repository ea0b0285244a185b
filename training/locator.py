"""Fit a task's density for the locator, and the frame that all densities share.

It does not know how prompts become features (`training.features`) or how tasks are told apart
(`runtime.model.locator`).
Read first: the frame is made once per repertoire from prompts of no task; a task's VAE sees that task's features alone,
so that adding a task moves nothing older (LLaVA-CMoE's Probabilistic Task Locator, arXiv 2503.21227).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.errors import InvalidInputError
from runtime.model.density import (
    LATENT,
    PROJECTED,
    RANK,
    Weights,
    background_error,
    decode,
    encode,
    raw_error,
    vae_shapes,
)
from runtime.model.locator import project
from runtime.model.manifest import Density
from training.config import TrainingConfig

_LEAST_EXAMPLES = 8
_LEAST_DEVIATION = 1e-6
_REFERENCE_SHRINKAGE = 0.6  # a few hundred reference prompts know their leading directions only
_TASK_SHRINKAGE = 0.6  # a hundred prompts of a task know less than the reference in most directions
_BACKGROUND_SHRINKAGE = 0.3
_BACKGROUND_WEIGHT = 1.3  # a task's held-out errors rise 1.2 times as fast as the background's, median of 15 tasks
_FOLDS = 20
_OUTSIDE_TAKEN = 0.005
_TOWARDS_OUTSIDE = 0.25


@dataclass(frozen=True)
class Calibration:
    """What held-out features say of a VAE's raw errors; the fields of `LocatorEntry` without the digest."""

    mean: float
    sd: float
    threshold: float


@dataclass(frozen=True)
class Entry:
    """A fitted density.

    Args:
        tensors: as in `density_shapes`, float32.
        prototype: [P] mean of the projected features that fitted it.
        calibration: on features that did not.
    """

    tensors: dict[str, torch.Tensor]
    prototype: torch.Tensor
    calibration: Calibration


def make_frame(
    reference: torch.Tensor,
    *,
    seed: int,
    density: Density = "vae",
    kinds: Sequence[int] | None = None,
    num_parts: int = 1,
) -> dict[str, torch.Tensor]:
    """Normalisation and projection of features, fixed for the life of a repertoire (ours).

    `mean` and `deviation` are those of each feature over the reference prompts. For VAEs the projection is normal with
    variance 1/D, so that a normalised feature keeps its squared length on average. For Gaussian densities it is
    `C^-1/2 Q`: C is how reference prompts of one kind vary among themselves, drawn towards a multiple of the identity,
    and Q are the directions in which all of them vary most after that. So distances are those of a Gaussian with one
    covariance for all tasks, what tells kinds apart is large, and adding a task never moves it (ours; within-class
    covariance normalisation, Hatch et al., Interspeech 2006).

    Args:
        reference: [B, D] features of prompts of no task; B >= 2. With parts [B, parts * D].
        seed: of a random projection.
        density: what the frame is for.
        kinds: of each reference prompt; None takes all of them as of one kind.
        num_parts: of a feature; every part is projected by itself.

    Returns:
        tensors as in `frame_shapes`, float32.
    """
    width = reference.shape[1] // num_parts
    mean, deviation = reference.mean(0), reference.std(0).clamp(min=_LEAST_DEVIATION)
    if density == "vae":
        generator = torch.Generator().manual_seed(seed)
        projection = torch.randn(width, PROJECTED, generator=generator) / math.sqrt(width)
    else:
        labels = torch.zeros(len(reference), dtype=torch.int64) if kinds is None else torch.tensor(kinds)
        split = ((reference - mean) / deviation).double().view(len(reference), num_parts, width)
        projection = torch.stack([_whitening(part, labels) for part in split.unbind(1)]).float()
        projection = projection if num_parts > 1 else projection[0]
    return {"mean": mean, "deviation": deviation, "projection": projection}


def _whitening(normalised: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """`((1 - s) C + s * trace(C)/256 * I)^-1/2 Q`, s = `_REFERENCE_SHRINKAGE`: [B, D] and [B] -> [D, 256].

    C is the rows' covariance around the means of their kinds, Q are the leading eigenvectors of their covariance around
    the mean of all once C is the identity; where D < 256 the rest of Q is zero.
    """
    found, which = torch.unique(kinds, return_inverse=True)
    centres = torch.stack([normalised[which == i].mean(0) for i in range(len(found))])
    around = normalised - centres[which]
    within = around.t() @ around / max(1, len(normalised) - len(found))
    level = (within.trace() / PROJECTED).clamp(min=_LEAST_DEVIATION)
    shrunk = (1 - _REFERENCE_SHRINKAGE) * within + _REFERENCE_SHRINKAGE * level * torch.eye(len(within)).double()
    values, vectors = torch.linalg.eigh(shrunk)
    whitened = vectors * values.rsqrt()  # [D, D]
    _, directions = torch.linalg.eigh(torch.cov((normalised @ whitened).t()))
    return torch.nn.functional.pad(whitened @ directions.flip(1)[:, :PROJECTED], (0, max(0, PROJECTED - len(within))))


def make_background(
    frame: dict[str, torch.Tensor], reference: torch.Tensor, *, unit_length: bool = False
) -> dict[str, torch.Tensor]:
    """What prompts in general look like, fixed for the life of a repertoire: a Gaussian of the reference (ours).

    The frame's axes are principal ones of the reference, so its dimensions are independent; each variance is drawn
    towards 1, `v = (1 - s) var + s`, s = `_BACKGROUND_SHRINKAGE`, as those of tasks are. The logarithm of its density
    is taken w times, w = `_BACKGROUND_WEIGHT`: dimensions that are not quite independent make it change too little
    from prompt to prompt, and with w an unusual prompt of a task is compared as its usual ones are.

    Args:
        frame: as made by `make_frame` for a Gaussian density.
        reference: [B, D] features of prompts of no task.
        unit_length: see `runtime.model.locator.project`.

    Returns:
        tensors as in `background_shapes`, float32.
    """
    projected = project(frame, reference, unit_length=unit_length).double()
    variances = (1 - _BACKGROUND_SHRINKAGE) * projected.var(0) + _BACKGROUND_SHRINKAGE
    return {
        "mean": projected.mean(0).float(),
        "precision": (_BACKGROUND_WEIGHT / variances).float(),
        "volume": (_BACKGROUND_WEIGHT * variances.log().sum()).reshape(1).float(),
    }


def fit_entry(
    frame: dict[str, torch.Tensor],
    own: torch.Tensor,
    reference: torch.Tensor,
    config: TrainingConfig,
    *,
    density: Density,
    seed: int,
    background: Weights | None = None,
    unit_length: bool = False,
) -> Entry:
    """Fit the density of one task and calibrate its error.

    A VAE minimises `|F - F'|^2 + beta * KL(q(z|F) || N(0, 1))` per prompt (paper), by full-batch AdamW with a falling
    rate (ours). A "gaussian" is the mean of the task's features, its covariance is in the frame; "low_rank" is a
    Gaussian with a covariance of its own (both ours). Mean, sd and threshold are those of the raw error of prompts that
    did not fit it, see `calibrate`: of a VAE, a share of the prompts never does; a Gaussian is fitted to 19 in 20 of
    them in turn, so that each is held out once, and in the end to all.

    Args:
        frame: as made by `make_frame` for this density.
        own: [B, D] features of the task's prompts.
        reference: [M, D] features of prompts of no task.
        config: the fields `locator_*`.
        density: what to fit.
        seed: of split, start and noise.
        background: as made by `make_background`, where the repertoire has one.
        unit_length: see `runtime.model.locator.project`.

    Raises:
        InvalidInputError: fewer than 8 prompts.
    """
    if own.shape[0] < _LEAST_EXAMPLES:
        raise InvalidInputError("examples", own.shape[0], f"the locator needs {_LEAST_EXAMPLES} or more per task")
    generator = torch.Generator().manual_seed(seed)
    projected = project(frame, own, unit_length=unit_length)  # [B, P]
    order = torch.randperm(len(projected), generator=generator)
    allowed = config.locator_false_abstain
    outside = project(frame, reference, unit_length=unit_length)
    if density == "vae":
        num_held_out = min(max(2, round(config.locator_held_out * len(order))), len(order) - 2)
        training = projected[order[num_held_out:]]
        tensors = {name: tensor[0].contiguous() for name, tensor in _fit(training, config, generator).items()}
        held_out = _errors("vae", tensors, projected[order[:num_held_out]], background)
    else:
        training = projected
        tensors = _gaussian(density, projected)
        held_out = torch.cat(
            [_held_out_errors(density, projected, order[i::_FOLDS], background) for i in range(min(_FOLDS, len(order)))]
        )
    found = calibrate(held_out, _errors(density, tensors, outside, background), false_abstain=allowed)
    return Entry(tensors, tensors["mean"] if "mean" in tensors else training.mean(0), found)


def _gaussian(density: Density, projected: torch.Tensor) -> dict[str, torch.Tensor]:
    return low_rank_gaussian(projected) if density == "low_rank" else {"mean": projected.mean(0).half().float()}


def _held_out_errors(
    density: Density, projected: torch.Tensor, chosen: torch.Tensor, background: Weights | None
) -> torch.Tensor:
    """Errors of the rows `chosen` under the density of all others."""
    rest = torch.ones(len(projected), dtype=torch.bool)
    rest[chosen] = False
    return _errors(density, _gaussian(density, projected[rest]), projected[chosen], background)


def _errors(density: Density, tensors: Weights, projected: torch.Tensor, background: Weights | None) -> torch.Tensor:
    """Raw errors of one density, as the locator computes them: [B, P] -> [B]."""
    stacked = {name: tensor.unsqueeze(0) for name, tensor in tensors.items()}
    errors = raw_error(density, stacked, projected)
    return (errors if background is None else errors - background_error(background, projected))[:, 0]


def low_rank_gaussian(projected: torch.Tensor) -> dict[str, torch.Tensor]:
    """A Gaussian of the rows of [B, P]: their mean, and their covariance drawn towards the reference's (ours).

    `C = (1 - s) cov + s I`, s = `_TASK_SHRINKAGE`; in the whitened space the reference's covariance is the identity.
    The 32 leading eigenvectors of C keep their variances, and all other directions share the mean of theirs. With fewer
    rows than dimensions they follow from the rows' products; directions that no row has are zero. All numbers are
    rounded to what float16 holds, so that a locator can keep thousands of them in half the memory.

    Returns:
        tensors as in `low_rank_shapes`, float32.
    """
    width, centred = projected.shape[1], projected.double() - projected.double().mean(0)
    total = centred.square().sum() / (len(projected) - 1)
    values, vectors = _leading(centred)
    variances = (1 - _TASK_SHRINKAGE) * values + _TASK_SHRINKAGE
    rest = (1 - _TASK_SHRINKAGE) * (total - values.sum()).clamp(min=0) / (width - RANK) + _TASK_SHRINKAGE
    tensors = {
        "mean": projected.mean(0),
        "directions": vectors.contiguous().float(),
        "gains": (1 / rest - 1 / variances).float(),
        "precision": (1 / rest).reshape(1).float(),
        "volume": (variances.log().sum() + (width - RANK) * rest.log()).reshape(1).float(),
    }
    return {name: tensor.half().float() for name, tensor in tensors.items()}


def _leading(centred: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 32 largest variances of the rows of [B, P] and their directions [32, P]; zero where there are fewer."""
    num, width = centred.shape
    if num >= width:
        values, vectors = torch.linalg.eigh(centred.t() @ centred / (num - 1))
        return values.flip(0)[:RANK].clamp(min=0), vectors.flip(1)[:, :RANK].t()
    values, vectors = torch.linalg.eigh(centred @ centred.t() / (num - 1))
    values, vectors = values.flip(0)[:RANK], vectors.flip(1)[:, :RANK]
    real = values > _LEAST_DEVIATION * values[0]
    lengths = (values * (num - 1)).clamp(min=_LEAST_DEVIATION).sqrt()
    directions = torch.where(real.unsqueeze(1), (centred.t() @ vectors / lengths).t(), 0.0)
    missing = RANK - len(values)
    pad = torch.nn.functional.pad
    return pad(torch.where(real, values, 0.0), (0, missing)), pad(directions, (0, 0, 0, missing))


def calibrate(held_out: torch.Tensor, outside: torch.Tensor, *, false_abstain: float) -> Calibration:
    """Threshold above which a prompt is refused, from errors in the task and errors outside of it (ours).

    `inside` = the error that all but `false_abstain` of the held-out prompts fall below; `beyond` = the error that one
    in 200 outside prompts falls below. Where `beyond > inside` the threshold lies between them, a quarter of the way,
    since prompts of a task vary more than those held out. Else it is `inside`: prompts of the task are never given up
    for the sake of refusing others.

    Args:
        held_out: [B] raw errors of prompts of the task that did not fit the density.
        outside: [M] raw errors of prompts of no task.
        false_abstain: share of the task's prompts that may be refused.
    """
    mean, sd = float(held_out.mean()), max(float(held_out.std()), _LEAST_DEVIATION)
    inside, beyond = float(held_out.quantile(1 - false_abstain)), float(outside.quantile(_OUTSIDE_TAKEN))
    return Calibration(mean, sd, inside + _TOWARDS_OUTSIDE * max(0.0, beyond - inside))


def _fit(projected: torch.Tensor, config: TrainingConfig, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A VAE of `projected` [B, 256], stacked as one of N = 1 so that it runs through the code that serves it."""
    weights = {name: _start(shape, generator).unsqueeze(0).requires_grad_() for name, shape in vae_shapes().items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=config.locator_learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.locator_steps)
    x = projected.unsqueeze(0)  # [1, B, 256]
    for _ in range(config.locator_steps):
        mean, log_variance = encode(weights, x)
        noise = torch.randn(1, x.shape[1], LATENT, generator=generator)
        rebuilt = decode(weights, mean + noise * (0.5 * log_variance).exp())
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(2)
        loss = ((x - rebuilt).square().sum(2) + config.locator_beta * divergence).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return {name: tensor.detach() for name, tensor in weights.items()}


def _start(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Uniform in +-1/sqrt(inputs) for a weight [out, in]; zero for a bias."""
    if len(shape) == 1:
        return torch.zeros(shape)
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[1])
