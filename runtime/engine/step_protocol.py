"""What a step model is to the engine: a base's weights, run range by range.

It knows nothing of which one runs (`runtime.engine.step_model` chooses).
Read first: `run_layers` changes the residual stream in place, and tokens of different sequences meet only there.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Protocol

import torch

from runtime.engine.attention import AttentionPlan
from runtime.engine.kv import KVCache, KVShape
from runtime.engine.llama import MixtureRows
from runtime.kernels.inspection import Inspector


class StepModel(Protocol):
    """`LlamaModel`, `NativeLlama` and `ModuleModel`; see the first for what the methods do.

    `dtype` is that of the residual stream, [T, D] on `device`; keys and values are of `kv_dtype`.
    """

    @property
    def layers(self) -> Sized:
        """One for each decoder layer."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def recordable(self) -> bool:
        """Whether a decode step queues all its work on `device`, and asks neither it nor the host for anything."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream."""

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of keys and values."""

    @property
    def inspector(self) -> Inspector:
        """Looks at experts that are read for it."""

    @property
    def max_context(self) -> int:
        """Tokens of a sequence at most."""

    @property
    def embedding(self) -> torch.Tensor:
        """[V, D]."""

    def kv_shape(self) -> KVShape:
        """Sizes of the KV cache."""

    def embed(self, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """What enters the first layer: [T] at `positions` [T] -> [T, D], a new tensor; None counts from 0.

        Any thread may call it.
        """

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Residual stream after the last layer -> logits: [T, D] -> [T, V] float32."""

    def forget(self, running: frozenset[str]) -> None:
        """Let go of what was prepared for mixtures other than those `running`."""

    def run_layers(
        self, hidden: torch.Tensor, layers: range, plan: AttentionPlan, cache: KVCache, mixtures: MixtureRows | None
    ) -> None:
        """Run a range of layers over `hidden` [T, D], in place."""
