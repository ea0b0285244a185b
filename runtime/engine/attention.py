"""Attention of one step: many decoding sequences and some prompt segments over the same cache.

It knows nothing of weights; it gets queries, keys and values of a flat list of tokens.
Read first: the first `num_decode` tokens are one per decoding sequence, then the tokens of each segment follow.
Decoding runs as batched matmuls over the slots and not as `scaled_dot_product_attention`, which on a CPU is slow for a
single query.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.functional import scaled_dot_product_attention

from runtime.engine.kv import KVCache


@dataclass(frozen=True)
class Segment:
    """Tokens `start .. start + length` of the sequence in `slot`."""

    slot: int
    start: int
    length: int


class AttentionPlan:
    """Where the tokens of a step lie; built once, used by every layer.

    Args:
        decode: (slot, position) of each decoding sequence's new token.
        segments: prompt segments, in the order of their tokens.
        device: of the index tensors.
    """

    def __init__(self, decode: Sequence[tuple[int, int]], segments: Sequence[Segment], device: torch.device) -> None:
        self.decode = tuple(decode)
        self.num_decode = len(decode)
        self.segments = tuple(segments)
        self._device = device

    def places(self) -> tuple[list[int], list[int]]:
        """Slot and position of every token."""
        slots, positions = [slot for slot, _ in self.decode], [position for _, position in self.decode]
        for segment in self.segments:
            slots += [segment.slot] * segment.length
            positions += range(segment.start, segment.start + segment.length)
        return slots, positions

    @cached_property
    def positions(self) -> torch.Tensor:
        """[T] int64."""
        return torch.tensor(self.places()[1], device=self._device)

    @cached_property
    def _slots(self) -> torch.Tensor:
        return torch.tensor([slot for slot, _ in self.decode], device=self._device)

    @cached_property
    def _bias(self) -> torch.Tensor:
        """[slots up to the last that decodes, 1, 1, context]: 0 where a slot's new token sees, -inf elsewhere."""
        lengths = torch.zeros(max(slot for slot, _ in self.decode) + 1, dtype=torch.int64)
        for slot, position in self.decode:
            lengths[slot] = position + 1
        hidden = torch.arange(int(lengths.max())) >= lengths.unsqueeze(1)
        # Rows of the span that do not decode see everything: their result is not read, but must be finite.
        hidden[lengths == 0] = False
        bias = torch.zeros(len(lengths), 1, 1, hidden.shape[1]).masked_fill_(hidden[:, None, None], -math.inf)
        return bias.to(self._device)

    def attend(self, cache: KVCache, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Write keys and values of the step's tokens into the cache, then attend causally.

        Args:
            cache: changed: the tokens' places in `layer`.
            layer: index.
            q: [T, heads, width], rotated.
            k: [T, kv heads, width], rotated.
            v: [T, kv heads, width].

        Returns:
            [T, heads * width].
        """
        keys, values = cache.keys[layer], cache.values[layer]
        out = torch.empty_like(q)
        num = self.num_decode
        if num:
            keys[self._slots, :, self.positions[:num]] = k[:num].to(keys.dtype)
            values[self._slots, :, self.positions[:num]] = v[:num].to(values.dtype)
            out[:num] = self._decode(keys, values, q[:num])
        begin = num
        for segment in self.segments:
            end, stop = begin + segment.length, segment.start + segment.length
            keys[segment.slot, :, segment.start : stop] = k[begin:end].transpose(0, 1)
            values[segment.slot, :, segment.start : stop] = v[begin:end].transpose(0, 1)
            seen_keys, seen_values = (cached[segment.slot, :, :stop].to(q.dtype) for cached in (keys, values))
            out[begin:end] = _prefill(seen_keys, seen_values, q[begin:end])
            begin = end
        return out.view(q.shape[0], -1)

    def _decode(self, keys: torch.Tensor, values: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """`softmax(q K^T / sqrt(width)) V` for one query per sequence; heads of a KV group share one matmul."""
        num_kv, width = keys.shape[1], q.shape[2]
        span, _, _, context = self._bias.shape
        spread = q.new_zeros(span, num_kv, q.shape[1] // num_kv, width)
        spread[self._slots] = q.view(q.shape[0], num_kv, -1, width) * width**-0.5
        scores = spread @ keys[:span, :, :context].to(q.dtype).transpose(2, 3)
        weights = torch.softmax(scores.float() + self._bias, dim=-1).to(q.dtype)
        mixed = weights @ values[:span, :, :context].to(q.dtype)
        return mixed[self._slots].view(q.shape)


class StaticPlan(AttentionPlan):
    """Decoding tokens whose places are read from tensors at every run; shapes depend on nothing else.

    Args:
        slots: [T] int64, below `span`; tokens that share a slot must share a position there, and are not read.
        positions: [T] int64, below `context`.
        span: slots that are looked at.
        context: tokens of each that are looked at.
    """

    def __init__(self, slots: torch.Tensor, positions: torch.Tensor, *, span: int, context: int) -> None:
        self.decode, self.segments, self.num_decode = (), (), len(slots)
        self.positions, self._slots = positions, slots
        lengths = positions.new_full((span,), context)
        lengths.index_put_((slots,), positions + 1)
        hidden = torch.arange(context, device=slots.device) >= lengths.unsqueeze(1)
        self._bias = torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, -math.inf)[:, None, None]


def _prefill(keys: torch.Tensor, values: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """[T, heads, width] over [kv heads, context, width]; the T queries are the last of the context."""
    length, context = q.shape[0], keys.shape[1]
    mask = None
    if context > length:
        mask = torch.ones(length, context, dtype=torch.bool, device=q.device).tril(context - length)
    out = scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)
