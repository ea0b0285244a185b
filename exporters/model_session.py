"""Runs a written `onnx-model` in onnxruntime: token ids in, logits out, the cache carried along.

It does not know tasks or torch models; what is fed as expert slots is the caller's.
Read first: the cache is what the last call gave; a call continues all sequences of the batch by the same number of
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporters.mixture_inputs import fitting
from exporters.verify import open_session
from runtime.errors import ExportMismatchError


class ModelSession:
    """One batch of sequences.

    Args:
        path: the graph.
        slots: expert slots of the batch, see `exporters.mixture_inputs`.
        device: cpu, cuda, or auto: cuda where onnxruntime has it.

    Raises:
        UnsupportedDeviceError: onnxruntime cannot run on this device.
        ExportMismatchError: onnxruntime does not take the file.
    """

    def __init__(self, path: Path, slots: Mapping[str, torch.Tensor], *, device: str = "cpu") -> None:
        self._name = path.name
        self._session = open_session(path, device=device)
        self.start(slots)

    def start(self, slots: Mapping[str, torch.Tensor]) -> None:
        """Begin a new batch: no past, other experts.

        Raises:
            InvalidInputError: the file lacks slots that these experts need.
        """
        names = {one.name for one in self._session.get_inputs()}
        self._slots = {name: tensor.numpy() for name, tensor in fitting(slots, names).items()}
        shape = next(one.shape for one in self._session.get_inputs() if one.name == "past_keys")
        nothing = np.zeros((shape[0], len(self._slots["top_k"]), shape[2], 0, shape[4]), dtype=np.float32)
        self._keys = self._values = nothing

    @property
    def num_past(self) -> int:
        """Tokens of each sequence so far."""
        return int(self._keys.shape[3])

    def step(self, ids: torch.Tensor, *, keep: int = 1) -> torch.Tensor:
        """Continue every sequence: ids [B, T] -> logits [B, keep, V] of its last `keep` tokens.

        Raises:
            ExportMismatchError: onnxruntime fails.
        """
        logits, self._keys, self._values = self._run(["logits", "keys", "values"], ids, keep)
        return torch.from_numpy(logits)

    def entering(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T, D]: what enters the first layer with experts for the prompts `ids` [B, T]; the cache stays as it is.

        Raises:
            ExportMismatchError: onnxruntime fails, or the file was made without routers that need this.
        """
        return torch.from_numpy(self._run(["entering"], ids, 1)[0])

    def _run(self, outputs: list[str], ids: torch.Tensor, keep: int) -> Any:  # noqa: ANN401 - onnxruntime is not typed
        inputs = {
            "ids": ids.numpy(),
            "logits_to_keep": np.array([keep]),
            "past_keys": self._keys,
            "past_values": self._values,
            **self._slots,
        }
        try:
            return self._session.run(outputs, inputs)
        except Exception as error:
            raise ExportMismatchError(f"{self._name}: onnxruntime fails on {tuple(ids.shape)} ids: {error}") from error

    def answer(self, ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Greedy tokens [B, num_tokens] behind the prompts `ids` [B, T]; no token ends an answer."""
        tokens = []
        for _ in range(num_tokens):
            ids = self.step(ids)[:, -1].argmax(1, keepdim=True)
            tokens.append(ids)
        return torch.cat(tokens, dim=1)

    def logits_along(self, ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [B, N, V] where the sequences are made to answer `tokens` [B, N], one step per token."""
        rows = [self.step(ids)]
        rows += [self.step(tokens[:, i : i + 1]) for i in range(tokens.shape[1] - 1)]
        return torch.cat(rows, dim=1)
