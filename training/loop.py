"""The loop around the steps: journal, early stop, and going on after a kill.

It does not know tasks or experts beyond what has gradients.
Read first: a training is known by a digest of everything that decides its outcome; a checkpoint of another one is
refused, never used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from runtime.model.attach import MixtureFFN
from runtime.model.base import BaseModel
from training.batches import Row
from training.config import TrainingConfig
from training.journal import Journal
from training.patience import Patience, hold_out
from training.seeds import seed_for
from training.steps import Progress, Steps
from training.team import Alone, Team


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a training has around it; none of it changes what is trained.

    Args:
        folder: gets the losses of every step and the checkpoints; None keeps neither.
        team: the processes that train together; None is this one alone.
        on_progress: see `Progress`.
    """

    folder: Path | None = None
    team: Team | None = None
    on_progress: Progress = lambda _step, _num_steps, _loss: None


def run_steps(
    base: BaseModel,
    ffns: Mapping[int, MixtureFFN],
    rows: Sequence[Row],
    *,
    name: str,
    config: TrainingConfig,
    around: Surroundings,
) -> tuple[float, ...]:
    """Train what has gradients in `ffns`, which are attached to `base`, in place.

    Returns:
        cross-entropy of every step, nats per answer token.

    Raises:
        NonFiniteError: the loss became NaN or infinite.
        InvalidInputError: the folder holds a checkpoint of another training; or too few rows to hold any out.
    """
    team = around.team or Alone()
    held_out: list[Row] = []
    if config.patience is not None:
        rows, held_out = hold_out(rows, share=config.held_out, seed=seed_for(config.seed, name, "held out"))
    steps = Steps(
        base,
        ffns,
        rows,
        name=name,
        config=config,
        num_steps=config.num_steps(len(rows)),
        order_seed=seed_for(config.seed, name, "order"),
        team=team,
    )
    patience = Patience(base, ffns, held_out, steps.parameters, config) if held_out else None
    journal = None
    losses: list[float] = []
    if around.folder is not None:
        identity = _identity(base, ffns, [*rows, *held_out], name=name, config=config, size=team.size)
        journal = Journal(around.folder, identity=identity, every=config.checkpoint_every, writes=team.index == 0)
        losses += _resume(journal, steps, patience)
    while steps.done < steps.num_steps and not (patience and patience.exhausted):
        losses.append(steps.step())
        looked = patience.look() if patience and patience.is_due(steps.done, steps.num_steps) else None
        if journal is not None:
            journal.note(steps.done, losses[-1], looked)
            if journal.is_due(steps.done):
                _keep(journal, steps, patience)
        around.on_progress(steps.done, steps.num_steps, losses[-1])
    if journal is not None:
        # Kept until the caller has stored what was trained: a kill in between costs no step.
        _keep(journal, steps, patience)
    if patience is not None:
        patience.give_back()
    return tuple(losses)


def _resume(journal: Journal, steps: Steps, patience: Patience | None) -> tuple[float, ...]:
    found = journal.resume()
    if found is None:
        return ()
    tensors, numbers, losses = found
    steps.load_state(tensors, done=len(losses))
    if patience is not None:
        patience.load_state(tensors, numbers)
    return losses


def _keep(journal: Journal, steps: Steps, patience: Patience | None) -> None:
    tensors, numbers = patience.state() if patience is not None else ({}, {})
    journal.keep({**steps.state(), **tensors}, numbers)


def _identity(
    base: BaseModel,
    ffns: Mapping[int, MixtureFFN],
    rows: Sequence[Row],
    *,
    name: str,
    config: TrainingConfig,
    size: int,
) -> str:
    """SHA-256 of everything that decides the outcome: base, data, settings, processes, and all weights at the start."""
    same = replace(config, checkpoint_every=TrainingConfig.checkpoint_every)
    settings = [(field.name, getattr(same, field.name)) for field in fields(same)]
    facts = (base.info.digest, str(base.model.dtype), name, size, settings, torch.__version__)
    hasher = hashlib.sha256(repr(facts).encode())
    for row in rows:
        hasher.update(repr(row).encode())
    for ffn in ffns.values():
        for module in (*ffn.experts.parameters(), ffn.router):
            hasher.update(module.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()
