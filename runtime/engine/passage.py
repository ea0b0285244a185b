"""A prompt's passage through the layers: what happens before the first, between the halves, and after the last.

It knows nothing of queues or tensors; casting decides mixtures, the prefix cache gives and keeps blocks.
Read first: blocks are kept before the mixture is decided and taken after it: only then is known whose they are.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

import torch

from runtime.engine.casting import Casting
from runtime.engine.prefix import PrefixCache
from runtime.engine.sequence import Sequence
from runtime.engine.step import PromptPart


class Passage:
    """Called on the engine's thread.

    Args:
        casting: chooses mixtures.
        prefixes: of earlier prompts.
        num_layers: of the model.
        embed: token ids -> residual stream [T, D] before the first layer.
    """

    def __init__(
        self,
        casting: Casting,
        prefixes: PrefixCache,
        *,
        num_layers: int,
        embed: Callable[[list[int]], torch.Tensor],
    ) -> None:
        self._casting = casting
        self._prefixes = prefixes
        self._num_layers = num_layers
        self._embed = embed

    def begin(self, sequence: Sequence) -> None:
        """The sequence has its slot."""
        self._casting.begin(sequence)
        if self._prefixes.first_layer == 0:  # no layer runs before the experts
            sequence.residual = self._embed(sequence.prompt)
            if not sequence.decided:
                self._casting.decide(sequence)
        self._prefixes.begin(sequence)

    def layers_ready(self, sequence: Sequence) -> int:
        """How many layers a prompt may pass by now."""
        ready = self._casting.layers_ready(sequence)
        border = self._prefixes.first_layer
        if not sequence.entered and sequence.decided and sequence.layers_done == border < ready:
            sequence.entered = True  # only now are the routers there, and with them the mixture's identity
            self._prefixes.enter(sequence)
        return self._prefixes.border(sequence, ready)

    def advance(self, parts: Items[PromptPart]) -> None:
        """These parts have run; those that ended a range may end a half."""
        for part in parts:
            sequence = part.sequence
            if sequence.layers_done != part.layers.stop:
                continue
            if sequence.layers_done == self._num_layers:
                self._prefixes.keep_adapted(sequence)
                continue
            if sequence.layers_done == self._prefixes.first_layer:
                self._prefixes.keep_base(sequence)
            if not sequence.decided:
                self._casting.decide(sequence)
