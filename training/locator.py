"""Fit a task's density for the locator, and the frame that all densities share.

It does not know how prompts become features (`training.features`) or how tasks are told apart
(`runtime.model.locator`).
Read first: the frame is made once per repertoire from prompts of no task; a task's VAE sees that task's features alone,
so that adding a task moves nothing older (LLaVA-CMoE's Probabilistic Task Locator, arXiv 2503.21227).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from runtime.errors import InvalidInputError
from runtime.model.locator import LATENT, PROJECTED, decode, encode, project, reconstruction_error, vae_shapes
from training.config import TrainingConfig

_LEAST_EXAMPLES = 8
_LEAST_DEVIATION = 1e-6


@dataclass(frozen=True)
class Calibration:
    """What held-out features say of a VAE's raw errors; the fields of `LocatorEntry` without the digest."""

    mean: float
    sd: float
    threshold: float


def make_frame(reference: torch.Tensor, *, seed: int) -> dict[str, torch.Tensor]:
    """Normalisation and projection of features, fixed for the life of a repertoire (ours).

    `mean` and `deviation` are those of each feature over the reference prompts; `projection` is normal with variance
    1/D, so that a normalised feature keeps its squared length on average.

    Args:
        reference: [B, D] features of prompts of no task; B >= 2.
        seed: of the projection.

    Returns:
        tensors as in `frame_shapes`, float32.
    """
    width = reference.shape[1]
    generator = torch.Generator().manual_seed(seed)
    return {
        "mean": reference.mean(0),
        "deviation": reference.std(0).clamp(min=_LEAST_DEVIATION),
        "projection": torch.randn(width, PROJECTED, generator=generator) / math.sqrt(width),
    }


def train_entry(
    frame: dict[str, torch.Tensor],
    own: torch.Tensor,
    reference: torch.Tensor,
    config: TrainingConfig,
    *,
    seed: int,
) -> tuple[dict[str, torch.Tensor], Calibration]:
    """Fit the VAE of one task and calibrate its error.

    Loss `|F - F'|^2 + beta * KL(q(z|F) || N(0, 1))` per prompt (paper), full-batch AdamW with a falling rate (ours). A
    share of the prompts never trains the VAE and gives mean, sd and threshold of the raw error; see `calibrate`.

    Args:
        frame: as made by `make_frame`.
        own: [B, D] features of the task's prompts.
        reference: [M, D] features of prompts of no task.
        config: the fields `locator_*`.
        seed: of split, start and noise.

    Returns:
        tensors as in `vae_shapes`, float32, and the calibration.

    Raises:
        InvalidInputError: fewer than 8 prompts.
    """
    if own.shape[0] < _LEAST_EXAMPLES:
        raise InvalidInputError("examples", own.shape[0], f"the locator needs {_LEAST_EXAMPLES} or more per task")
    generator = torch.Generator().manual_seed(seed)
    projected = project(frame, own)  # [B, 256]
    order = torch.randperm(len(projected), generator=generator)
    num_held_out = min(max(2, round(config.locator_held_out * len(order))), len(order) - 2)
    held_out, training = projected[order[:num_held_out]], projected[order[num_held_out:]]
    stacked = _fit(training, config, generator)
    errors = reconstruction_error(stacked, held_out)[:, 0]
    outside = reconstruction_error(stacked, project(frame, reference))[:, 0]
    return {name: tensor[0].contiguous() for name, tensor in stacked.items()}, calibrate(errors, outside)


def calibrate(held_out: torch.Tensor, outside: torch.Tensor) -> Calibration:
    """Threshold above which a prompt is refused, from errors in the task and errors outside of it (ours).

    `inside = max(largest held-out error, mean + 4 sd)`; `beyond` = the error that 5 % of outside prompts fall below.
    Where `beyond > inside` the threshold is their geometric mean, else `inside`: prompts of the task are never given up
    for the sake of refusing others.

    Args:
        held_out: [B] raw errors of prompts of the task that did not train the VAE.
        outside: [M] raw errors of prompts of no task.
    """
    mean, sd = float(held_out.mean()), max(float(held_out.std()), _LEAST_DEVIATION)
    inside = max(float(held_out.max()), mean + 4 * sd)
    beyond = float(outside.quantile(0.05))
    threshold = math.sqrt(inside * beyond) if beyond > inside else inside
    return Calibration(mean, sd, threshold)


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
