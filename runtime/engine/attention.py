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
        self.num_decode = len(decode)
        self.segments = tuple(segments)
        self.num_tokens = self.num_decode + sum(segment.length for segment in segments)
        places = [torch.tensor([position for _, position in decode], dtype=torch.int64)]
        places += [torch.arange(segment.start, segment.start + segment.length) for segment in segments]
        self.positions = torch.cat(places).to(device)
        self.slots = torch.tensor([slot for slot, _ in decode], device=device)
        if decode:
            self.span = max(slot for slot, _ in decode) + 1
            self.context = max(position for _, position in decode) + 1
            lengths = torch.zeros(self.span, dtype=torch.int64)
            for slot, position in decode:
                lengths[slot] = position + 1
            # Rows of the span that do not decode see everything: their result is not read, but must be finite.
            hidden = torch.arange(self.context) >= lengths.unsqueeze(1)
            hidden[lengths == 0] = False
            self.bias = torch.zeros(self.span, 1, 1, self.context).masked_fill_(hidden[:, None, None], -math.inf)
            self.bias = self.bias.to(device)

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
            keys[self.slots, :, self.positions[:num]] = k[:num]
            values[self.slots, :, self.positions[:num]] = v[:num]
            out[:num] = self._decode(keys, values, q[:num])
        begin = num
        for segment in self.segments:
            end, stop = begin + segment.length, segment.start + segment.length
            keys[segment.slot, :, segment.start : stop] = k[begin:end].transpose(0, 1)
            values[segment.slot, :, segment.start : stop] = v[begin:end].transpose(0, 1)
            out[begin:end] = _prefill(keys[segment.slot, :, :stop], values[segment.slot, :, :stop], q[begin:end])
            begin = end
        return out.view(q.shape[0], -1)

    def _decode(self, keys: torch.Tensor, values: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """`softmax(q K^T / sqrt(width)) V` for one query per sequence; heads of a KV group share one matmul."""
        num_kv, width = keys.shape[1], q.shape[2]
        spread = q.new_zeros(self.span, num_kv, q.shape[1] // num_kv, width)
        spread[self.slots] = q.view(q.shape[0], num_kv, -1, width) * width**-0.5
        scores = spread @ keys[: self.span, :, : self.context].transpose(2, 3)
        weights = torch.softmax(scores.float() + self.bias, dim=-1).to(q.dtype)
        mixed = weights @ values[: self.span, :, : self.context]
        return mixed[self.slots].view(q.shape)


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
