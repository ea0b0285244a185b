"""The journal of one training: a line per step, and checkpoints from which it goes on exactly where it was.

It does not know models or losses; it keeps what `training.steps.Steps` and `training.patience.Patience` give it.
Read first: a checkpoint holds everything that the next step depends on, and says which training it is of; a training
that was killed and goes on gives the same bytes as one that was not. The checkpoint goes when
what was trained has been published.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from runtime.errors import InvalidInputError
from runtime.model.durable import write_durably

LOSSES_FILE = "losses.jsonl"
CHECKPOINT_FILE = "checkpoint.safetensors"


class Journal:
    """Where one training writes.

    Args:
        folder: of this training alone; made if it is not there.
        identity: what tells this training from others: a digest of data, settings and where the weights begin.
        every: steps between two checkpoints.
        writes: False for a process that only goes on from where another one left off.
    """

    def __init__(self, folder: Path, *, identity: str, every: int, writes: bool = True) -> None:
        self._writes = writes
        folder.mkdir(parents=True, exist_ok=True)
        self._losses = folder / LOSSES_FILE
        self._checkpoint = folder / CHECKPOINT_FILE
        self._identity = identity
        self._every = every
        self._lines: list[dict[str, float]] = []

    def resume(self) -> tuple[dict[str, torch.Tensor], dict[str, Any], tuple[float, ...]] | None:
        """The last checkpoint: tensors, numbers, and the losses up to it; None where there is none.

        Raises:
            InvalidInputError: it is of another training, or damaged.
        """
        if not self._checkpoint.is_file():
            self._write_losses()
            return None
        try:
            with safe_open(self._checkpoint, framework="pt") as file:
                notes = json.loads(file.metadata()["greenroom"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InvalidInputError(
                "checkpoint", CHECKPOINT_FILE, f"that in {self._checkpoint.parent} is damaged: {error}"
            ) from error
        if notes["identity"] != self._identity:
            raise InvalidInputError(
                "checkpoint",
                CHECKPOINT_FILE,
                f"that in {self._checkpoint.parent} is of a training with other data, settings or experts: "
                "remove it to begin anew",
            )
        self._lines = notes["lines"]
        self._write_losses()
        return tensors, notes["numbers"], tuple(each["loss"] for each in self._lines)

    def note(self, step: int, loss: float, held_out: float | None) -> None:
        """Write down one step."""
        line = {"step": step, "loss": loss}
        if held_out is not None:
            line["held_out"] = held_out
        self._lines.append(line)
        if not self._writes:
            return
        with self._losses.open("a") as file:
            file.write(_line(line))

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after this step."""
        return self._writes and step % self._every == 0

    def keep(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Replace the checkpoint, durably."""
        if not self._writes:
            return
        notes = {"identity": self._identity, "lines": self._lines, "numbers": dict(numbers)}
        data = save(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {"greenroom": json.dumps(notes)}
        )
        write_durably(self._checkpoint, data, kind="checkpoint")

    def _write_losses(self) -> None:
        if self._writes:
            self._losses.write_text("".join(_line(each) for each in self._lines))


def read_losses(folder: Path) -> list[dict[str, float]]:
    """The lines of a journal: `step`, `loss`, and `held_out` where it was measured."""
    return [json.loads(line) for line in (folder / LOSSES_FILE).read_text().splitlines()]


def _line(fields: Mapping[str, float]) -> str:
    return json.dumps(fields) + "\n"
