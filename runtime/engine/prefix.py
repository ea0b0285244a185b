"""Prefix cache: what the beginnings of earlier prompts left in the KV cache, kept in blocks and given to later prompts.

It knows nothing of queues or weights; blocks are copied into a sequence's own slot, and out of it.
Read first: a prompt's blocks come in two halves. Below `first_layer` nothing depends on a mixture: those, with the
residual stream that leaves them, serve all requests. From there on a block belongs to one mixture of one generation.
A key is a SHA-256 over typed, length-prefixed fields: base, half, generation, mixture, and all tokens up to its end.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from runtime.engine.kv import KVCache
from runtime.engine.sequence import Phase, Sequence
from runtime.model.mixture import fields_digest

BLOCK = 16
"""Tokens of a block."""


@dataclass(frozen=True)
class _Block:
    """Keys and values [L', heads, BLOCK, width] of one half; below the experts also the residual stream [BLOCK, D]."""

    keys: torch.Tensor
    values: torch.Tensor
    residual: torch.Tensor | None

    @property
    def num_bytes(self) -> int:
        tensors = (self.keys, self.values, *(() if self.residual is None else (self.residual,)))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class PrefixCache:
    """Blocks under a byte budget, the least recently used go first; on the engine's thread only.

    Args:
        cache: where sequences' keys and values are.
        first_layer: the first layer with experts.
        budget_bytes: 0 keeps nothing.
        embed: token ids -> residual stream [T, D] before the first layer.

    `hits` counts prompts that got anything, `base_tokens` and `adapted_tokens` the tokens that they did not have to
    compute below and above `first_layer`.
    """

    def __init__(
        self, cache: KVCache, *, first_layer: int, budget_bytes: int, embed: Callable[[list[int]], torch.Tensor]
    ) -> None:
        self._cache = cache
        self.first_layer = first_layer
        self._lower = slice(0, first_layer)
        self._upper = slice(first_layer, cache.shape.num_layers)
        self._budget_bytes = budget_bytes
        self._embed = embed
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()
        self.num_bytes = self.hits = self.base_tokens = self.adapted_tokens = 0

    def border(self, sequence: Sequence, ready: int) -> int:
        """How far a prompt goes that may go up to layer `ready`: one that has blocks stops once between the halves."""
        stops = self._serves(sequence) and len(sequence.prompt) >= BLOCK and sequence.layers_done < self.first_layer
        return min(ready, self.first_layer) if stops else ready

    @torch.inference_mode()
    def begin(self, sequence: Sequence) -> None:
        """Give a sequence with a fresh slot what is known of its prompt in the first half that it runs through."""
        if sequence.generation.manifest.locator.layer not in {0, self.first_layer}:
            return  # the residual stream that is kept is not the one that the locator reads
        if not self.first_layer or not self._serves(sequence):
            return
        found = self._find(_base_root(sequence), sequence.prompt, len(sequence.prompt) - 1)
        if not found:
            return
        self._fill(sequence, self._lower, found)
        count = len(found) * BLOCK
        sequence.residual = self._embed(sequence.prompt)
        sequence.residual[:count] = torch.cat([block.residual for block in found if block.residual is not None])
        sequence.tokens_skipped = sequence.tokens_done = count
        self.hits += 1
        self.base_tokens += count

    @torch.inference_mode()
    def keep_base(self, sequence: Sequence) -> None:
        """Keep the blocks of a prompt that stands before the experts, as far as they are new."""
        if self.first_layer:
            self._keep(sequence, _base_root(sequence), self._lower, sequence.residual)

    @torch.inference_mode()
    def enter(self, sequence: Sequence) -> None:
        """Give a sequence whose mixture is fixed, and whose prompt stands before the experts, what is known from there.

        The tokens that an answer comes of are always computed.
        """
        if sequence.phase is not Phase.PROMPT or not self._serves(sequence):
            return
        found = self._find(_mixture_root(sequence), sequence.prompt, sequence.answering.start)
        count = len(found) * BLOCK
        self._fill(sequence, self._upper, found)
        self.hits += bool(found) and not sequence.tokens_skipped
        sequence.cached_tokens = min(count, sequence.tokens_skipped) if self.first_layer else count
        sequence.tokens_skipped = sequence.tokens_done = count
        self.adapted_tokens += count

    @torch.inference_mode()
    def keep_adapted(self, sequence: Sequence) -> None:
        """Keep the blocks of a complete prompt above the experts' first layer, as far as they are new."""
        self._keep(sequence, _mixture_root(sequence), self._upper, None)

    def statistics(self) -> dict[str, int]:
        """A snapshot, by the names in `runtime.engine.statistics`."""
        return {
            "prefix_hits": self.hits,
            "prefix_base_tokens": self.base_tokens,
            "prefix_adapted_tokens": self.adapted_tokens,
            "prefix_bytes": self.num_bytes,
        }

    def check_integrity(self) -> None:
        """Assert that the sum is right and within the budget."""
        assert self.num_bytes == sum(block.num_bytes for block in self._blocks.values()), "prefix bytes drifted"
        assert self.num_bytes <= self._budget_bytes, "the prefix cache exceeds its budget"

    def _serves(self, sequence: Sequence) -> bool:
        return self._budget_bytes > 0 and sequence.request.share_prefix

    def _find(self, root: str, prompt: list[int], limit: int) -> list[_Block]:
        found: list[_Block] = []
        keys = _keys(root, prompt, limit) if self._blocks else []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
        self._touch(keys[: len(found)])
        return found

    def _fill(self, sequence: Sequence, layers: slice, found: list[_Block]) -> None:
        for place, block in enumerate(found):
            tokens = slice(place * BLOCK, (place + 1) * BLOCK)
            self._cache.keys[layers, sequence.held_slot, :, tokens] = block.keys
            self._cache.values[layers, sequence.held_slot, :, tokens] = block.values

    def _keep(self, sequence: Sequence, root: str, layers: slice, residual: torch.Tensor | None) -> None:
        if not self._serves(sequence):
            return
        keys = _keys(root, sequence.prompt, len(sequence.prompt))
        for place, key in enumerate(keys):
            if key not in self._blocks:
                tokens = slice(place * BLOCK, (place + 1) * BLOCK)
                block = self._blocks[key] = _Block(
                    self._cache.keys[layers, sequence.held_slot, :, tokens].clone(),
                    self._cache.values[layers, sequence.held_slot, :, tokens].clone(),
                    None if residual is None else residual[tokens].clone(),
                )
                self.num_bytes += block.num_bytes
        self._touch(keys)
        while self.num_bytes > self._budget_bytes:
            _, block = self._blocks.popitem(last=False)
            self.num_bytes -= block.num_bytes

    def _touch(self, keys: list[bytes]) -> None:
        for key in reversed(keys):  # a block outlives those that come after it, which cannot be found without it
            self._blocks.move_to_end(key)


def _base_root(sequence: Sequence) -> str:
    manifest = sequence.generation.manifest
    return fields_digest("base", manifest.base.digest, str(manifest.first_layer))


def _mixture_root(sequence: Sequence) -> str:
    manifest, mixture = sequence.generation.manifest, sequence.mixture
    if mixture is None:
        return fields_digest("plain", manifest.base.digest, str(manifest.first_layer))
    return fields_digest(
        "mixture", manifest.base.digest, str(manifest.first_layer), str(manifest.generation), mixture.digest
    )


def _keys(root: str, prompt: list[int], limit: int) -> list[bytes]:
    """Keys of the whole blocks among the first `limit` tokens; each covers all tokens before it."""
    keys: list[bytes] = []
    before = root.encode()
    for end in range(BLOCK, limit + 1, BLOCK):
        tokens = np.array(prompt[end - BLOCK : end], dtype="<u4").tobytes()
        before = hashlib.sha256(len(before).to_bytes(8, "little") + before + tokens).digest()
        keys.append(before)
    return keys
