"""What a Hugging Face model calls its decoder layers with: positions, masks and all else, told by its own forward.

It knows nothing of experts or steps.
Read first: the layers of the model that is taken over never run inside its forward again; in their place stands what
writes their arguments down and lets the residual stream pass. So whatever an architecture does before, between and
after its layers, this code need not know it; what depends on the layers' results in between is not supported.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from runtime.engine.slot_cache import slot_cache


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one layer beside the residual stream, and that stream as it was, [B, T, D]."""

    hidden: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class LayerCalls:
    """A model whose forward calls no layer.

    Args:
        model: taken over.
        layers: its decoder layers.
        gives_tuple: whether a layer's forward gives its residual stream as the first of a tuple.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[nn.Module], *, gives_tuple: bool) -> None:
        self._model: Any = model
        self._lock = threading.Lock()  # prompts are embedded on the threads that submit them
        self._calls: list[LayerCall] = []
        self._given: torch.Tensor | None = None
        self._gives_tuple = gives_tuple
        self._layers = tuple(layers)
        self._own: list[Callable[..., Any]] = [layer.forward for layer in layers]
        for layer in layers:
            layer.forward = self._pass

    def calls(self, num_tokens: int, cache: Cache) -> list[LayerCall]:
        """The calls for tokens that follow those in `cache`, whatever they are."""
        ids = torch.zeros(1, num_tokens, dtype=torch.int64, device=self._model.device)
        return self._record(ids, cache)

    def embed(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        """What enters the first layer for token ids [T] at positions from `start` on: [T, D]."""
        return self._record(ids.unsqueeze(0), slot_cache(len(self._layers), start))[0].hidden[0]

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What leaves the last layer -> logits: [T, D] -> [T, V]."""
        ids = torch.zeros(hidden.shape[0], 1, dtype=torch.int64, device=hidden.device)
        with self._lock:
            self._given = hidden.unsqueeze(1)
            try:
                logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits
            finally:
                self._given = None
                self._calls = []
        return logits[:, 0]

    def run(self, index: int, hidden: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Run one layer over [1, T, D]."""
        result = self._own[index](hidden, *call.args, **call.kwargs)
        return result[0] if self._gives_tuple else result  # type: ignore[no-any-return]

    @torch.no_grad()
    def _record(self, ids: torch.Tensor, cache: Cache) -> list[LayerCall]:
        with self._lock:
            try:
                self._model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
                return self._calls
            finally:
                self._calls = []

    def _pass(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - what the architecture's layers take and give
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")
        self._calls.append(LayerCall(hidden, args, kwargs))
        result = hidden if self._given is None else self._given
        return (result,) if self._gives_tuple else result
