"""One slot of the KV cache as `transformers` wants a cache: a sequence's keys and values up to the tokens of a step.

It knows nothing of models or of other slots.
Read first: writing does not move `start`; a layer may be run again, and writes the same places again.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from runtime.engine.kv import KVCache


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """Keys and values [heads, context, width] of one layer, of which the first `start` tokens are there."""

    def __init__(self, keys: torch.Tensor | None, values: torch.Tensor | None, start: int) -> None:
        super().__init__()
        self._held = None if keys is None or values is None else (keys, values)
        self._start = start
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is to be prepared."""

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *_args: Any,  # noqa: ANN401 - what other kinds of cache need
        **_kwargs: Any,  # noqa: ANN401 - as above
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [1, heads, T, width] behind the first `start` tokens; all from the first on, in the same form."""
        assert self._held is not None, "a cache without a slot is for positions and masks only"
        stop = self._start + key_states.shape[2]
        for held, states in zip(self._held, (key_states, value_states), strict=True):
            held[:, self._start : stop] = states[0].to(held.dtype)
        keys, values = (held[:, :stop].unsqueeze(0).to(key_states.dtype) for held in self._held)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that T queries may see, and the position of the first."""
        return self._start + int(query_length), 0

    def get_seq_length(self) -> int:
        """Tokens before those of the step."""
        return self._start

    def get_max_length(self) -> int:
        """There is no bound that a layer need know of."""
        return -1


def slot_cache(num_layers: int, start: int, cache: KVCache | None = None, slot: int = 0) -> Cache:
    """A cache of a sequence whose first `start` tokens are in `slot` of `cache`; without one it says only how many."""
    if cache is None:
        return Cache(layers=[_SlotLayer(None, None, start) for _ in range(num_layers)])
    return Cache(
        layers=[_SlotLayer(cache.keys[index, slot], cache.values[index, slot], start) for index in range(num_layers)]
    )
