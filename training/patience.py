"""Early stop: training ends when held-out loss has not fallen for a while, and gives back the best it had.

It does not know how steps are made.
Read first: the rows that are held out never train; without `patience` in the configuration none are held out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from runtime.errors import InvalidInputError
from runtime.model.attach import MixtureFFN
from runtime.model.base import BaseModel
from training.batches import Row
from training.config import TrainingConfig
from training.held_out import attached_loss


def hold_out(rows: Sequence[Row], *, share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows that train, in their order, and at least one that does not.

    Raises:
        InvalidInputError: fewer than two rows.
    """
    if len(rows) < 2:
        raise InvalidInputError("examples", len(rows), "early stopping needs 2 or more")
    drawn = set(random.Random(seed).sample(range(len(rows)), max(1, round(share * len(rows)))))  # noqa: S311 - a draw of examples is no secret
    return [row for i, row in enumerate(rows) if i not in drawn], [rows[i] for i in sorted(drawn)]


class Patience:
    """Looks at held-out loss every so often.

    Args:
        base: with `ffns` attached while `look` runs.
        ffns: the mixtures in training.
        rows: held out.
        parameters: what is trained; the best values are kept.
        config: `evaluate_every`, `patience` and `batch_size`.
    """

    def __init__(
        self,
        base: BaseModel,
        ffns: Mapping[int, MixtureFFN],
        rows: Sequence[Row],
        parameters: Sequence[nn.Parameter],
        config: TrainingConfig,
    ) -> None:
        self._base, self._ffns, self._rows, self._config = base, ffns, rows, config
        self._parameters = parameters
        self._best = math.inf
        self._misses = 0
        self._kept: list[torch.Tensor] = []

    @property
    def exhausted(self) -> bool:
        """Whether the last `patience` looks all found no gain."""
        return self._config.patience is not None and self._misses >= self._config.patience

    def is_due(self, step: int, num_steps: int) -> bool:
        """Whether to look after this step."""
        return step % self._config.evaluate_every == 0 or step == num_steps

    def look(self) -> float:
        """Measure; keep the parameters if they are the best so far. Returns the loss, nats per answer token."""
        loss, _ = attached_loss(self._base, self._ffns, self._rows, batch_size=self._config.batch_size)
        if loss < self._best:
            self._best, self._misses = loss, 0
            self._kept = [parameter.detach().clone() for parameter in self._parameters]
        else:
            self._misses += 1
        return loss

    @torch.no_grad()
    def give_back(self) -> None:
        """Set the parameters to the best that were seen."""
        for parameter, best in zip(self._parameters, self._kept, strict=True):
            parameter.copy_(best)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """For a checkpoint: tensors, and numbers."""
        tensors = {f"best.{i}": tensor for i, tensor in enumerate(self._kept)}
        return tensors, {"misses": self._misses, **({"best": self._best} if self._kept else {})}

    def load_state(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, float]) -> None:
        """The reverse of `state`."""
        self._best, self._misses = numbers.get("best", math.inf), int(numbers["misses"])
        if "best" in numbers:
            device = self._base.model.device
            self._kept = [tensors[f"best.{i}"].to(device) for i in range(len(self._parameters))]
