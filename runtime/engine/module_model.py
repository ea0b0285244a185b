"""The step of a base that our own steps do not know: its layers run through their own Hugging Face modules.

It knows nothing of requests; it stands where a `LlamaModel` stands, slower, with the same results as `transformers`.
Read first: sequences run one after the other, each through a whole range of layers. A model is tried out when it is
taken over: what does not give its own logits layer by layer is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from transformers import DynamicCache, PreTrainedModel

from runtime.engine.attention import AttentionPlan, Segment
from runtime.engine.kv import KVCache, KVShape
from runtime.engine.layer_calls import LayerCalls
from runtime.engine.llama import MixtureRows
from runtime.engine.module_hooks import Mixing, ModuleHooks
from runtime.engine.slot_cache import slot_cache
from runtime.errors import InvalidInputError, TensorMismatchError
from runtime.kernels.inspection import Inspector
from runtime.model.attach import decoder_layers
from runtime.model.layer_names import layer_names

_TRIED = 6
"""Tokens of the trial."""
_NEAR = {torch.float32: 1e-3}
_NEAR_ROUNDED = 0.1
"""How far the trial's logits may be from the model's own, relative to their norm."""


class ModuleModel:
    """A causal LM of any architecture whose linears `runtime.model.layer_names` knows.

    Args:
        model: a Hugging Face model; taken over, it cannot be used afterwards.
        max_context: tokens of a sequence at most.

    Raises:
        InvalidInputError: an architecture that does not run layer by layer, or cannot take experts.
    """

    recordable = False

    def __init__(self, model: PreTrainedModel, *, max_context: int) -> None:
        self.inspector = Inspector()
        self._name = type(model).__name__
        longest = getattr(model.config, "max_position_embeddings", max_context)
        if not 1 <= max_context <= longest:
            raise InvalidInputError("max_context", max_context, f"the base reads up to {longest}")
        try:
            self.layers = tuple(decoder_layers(model))
            self._hooks = ModuleHooks(self.layers, layer_names(self._name), model.config)
        except (TensorMismatchError, AttributeError) as error:
            raise InvalidInputError("base", self._name, f"experts cannot be attached to it: {error}") from error
        self.max_context = max_context
        self.dtype = self.kv_dtype = model.dtype
        self.device = model.device
        self.width = int(model.config.hidden_size)
        self.embedding = model.get_input_embeddings().weight.detach()
        try:
            self._take_over(model)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InvalidInputError("base", self._name, f"its layers cannot be run one by one: {error}") from error

    @torch.inference_mode()
    def _take_over(self, model: PreTrainedModel) -> None:
        given: list[object] = []
        hook = self.layers[0].register_forward_hook(lambda _module, _args, output: given.append(output))
        ids, cache = torch.arange(_TRIED, device=self.device) % model.config.vocab_size, DynamicCache()
        own = model(input_ids=ids.unsqueeze(0), past_key_values=cache, use_cache=True).logits[0].float()
        hook.remove()
        shapes = {tuple(layer.keys.shape[1::2]) for layer in cache.layers}
        if len(shapes) > 1 or len(cache.layers) != len(self.layers):
            raise ValueError("they do not all keep keys and values alike")
        ((heads, width),) = shapes
        self._shape = KVShape(num_layers=len(self.layers), num_heads=heads, head_width=width, context=self.max_context)
        self._calls = LayerCalls(model, self.layers, gives_tuple=isinstance(given[0], tuple))
        distance = float((self._tried(ids) - own).norm() / own.norm())
        if not distance < _NEAR.get(self.dtype, _NEAR_ROUNDED):
            raise ValueError(f"so run they give other logits (by {distance:.0%})")

    def _tried(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [T, V] of tokens that come in two parts and a decode, each in two ranges of layers."""
        shape = KVShape(**{**vars(self._shape), "context": _TRIED})
        cache = KVCache(shape, num_slots=2, budget_bytes=1 << 40, dtype=self.kv_dtype, device=self.device)
        parts = []
        for start, stop in pairwise((0, 2, _TRIED - 1, _TRIED)):
            part = self.embed(ids[start:stop], torch.arange(start, stop, device=self.device))
            decode, segments = ([(1, start)], []) if stop == _TRIED else ([], [Segment(1, start, stop - start)])
            for layers in (range(1), range(1, len(self.layers))):
                self.run_layers(part, layers, AttentionPlan(decode, segments, self.device), cache, None)
            parts.append(part)
        return self.logits(torch.cat(parts))

    def kv_shape(self) -> KVShape:
        """Sizes of the KV cache that this model needs."""
        return self._shape

    def embed(self, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """What enters the first layer, [T] -> [T, D], a new tensor; see `StepModel.embed`."""
        if positions is None or not len(ids):
            return self._calls.embed(ids, 0).clone() if len(ids) else self.embedding[:0]
        places = positions.tolist()
        breaks = [0, *(i for i in range(1, len(places)) if places[i] != places[i - 1] + 1), len(places)]
        return torch.cat([self._calls.embed(ids[i:j], places[i]) for i, j in pairwise(breaks)])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Residual stream after the last layer -> logits: [T, D] -> [T, V] float32."""
        return self._calls.logits(hidden).float()

    def forget(self, running: frozenset[str]) -> None:
        """Nothing is prepared for mixtures."""

    def run_layers(
        self,
        hidden: torch.Tensor,
        layers: range,
        plan: AttentionPlan,
        cache: KVCache,
        mixtures: MixtureRows | None,
    ) -> None:
        """As `LlamaModel.run_layers`."""
        weights: dict[int, list[torch.Tensor]] = {}
        begin = 0
        for segment in _segments(plan):
            end = begin + segment.length
            past = slot_cache(len(self.layers), segment.start, cache, segment.slot)
            calls = self._calls.calls(segment.length, past)
            x = hidden[begin:end].unsqueeze(0)
            for index in layers:
                staged = mixtures.stage.layers.get(index) if mixtures else None
                if mixtures is None or staged is None:
                    x = self._calls.run(index, x, calls[index])
                    continue
                mixing = Mixing(staged, mixtures.rows[begin:end])
                with self._hooks.mixing(mixing):
                    x = self._calls.run(index, x, calls[index])
                weights.setdefault(index, []).append(mixing.weights)
            hidden[begin:end] = x[0]
            begin = end
        if mixtures is not None and mixtures.watch is not None:
            for index, parts in weights.items():
                mixtures.watch.note(index, torch.cat(parts))


def _segments(plan: AttentionPlan) -> Sequence[Segment]:
    """The sequences of a step, in the order of their tokens."""
    return (*(Segment(slot, position, 1) for slot, position in plan.decode), *plan.segments)
