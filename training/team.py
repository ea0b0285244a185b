"""Several processes that train one task together, through `accelerate`.

It does not know models or data.
Read first: every process holds the same weights and computes its share of each batch; gradients are summed, so all take
the same step. `accelerate launch --num_processes 2 -m greenroom.cli.main train ...` starts them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import nn


class Team(Protocol):
    """The processes that train together, as one of them sees it."""

    @property
    def index(self) -> int:
        """Number of this process; 0 writes."""

    @property
    def size(self) -> int:
        """Number of processes."""

    def sum_gradients(self, parameters: Iterable[nn.Parameter], value: float) -> float:
        """Add up the gradients of all processes, in place; returns the sum of their values."""

    def wait(self) -> None:
        """Go on when all processes are here."""


class Alone:
    """One process."""

    index = 0
    size = 1

    def sum_gradients(self, parameters: Iterable[nn.Parameter], value: float) -> float:  # noqa: ARG002 - nothing to add
        """Nothing to add."""
        return value

    def wait(self) -> None:
        """Nobody to wait for."""


class AcceleratedTeam:
    """The processes that `accelerate launch` started.

    Args:
        cpu: train on CPUs even where there are GPUs.
    """

    def __init__(self, *, cpu: bool) -> None:
        from accelerate import Accelerator

        self._accelerator = Accelerator(cpu=cpu)
        self.index: int = self._accelerator.process_index
        self.size: int = self._accelerator.num_processes

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        device: torch.device = self._accelerator.device
        return device

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter], value: float) -> float:
        """Add up the gradients of all processes, in place and in one message; returns the sum of their values."""
        trained = list(parameters)
        for parameter in trained:
            if parameter.grad is None:  # this process had no examples of the batch
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad.flatten() for parameter in trained if parameter.grad is not None]
        flat = torch.cat([*grads, torch.tensor([value], device=grads[0].device)])
        total = self._accelerator.reduce(flat, reduction="sum")
        start = 0
        for parameter in trained:
            assert parameter.grad is not None, "set above"
            parameter.grad.copy_(total[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()
        return float(total[-1])

    def wait(self) -> None:
        """Go on when all processes are here."""
        self._accelerator.wait_for_everyone()

    def end(self) -> None:
        """Leave the team; nothing is summed afterwards."""
        self._accelerator.end_training()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
