"""From logits to events: tokens are chosen for all sequences of a step together, and each says its own.

It knows nothing of queues or models.
Read first: the choices of one prompt get their KV slots together, before it begins; when it is complete, what its first
choice computed is copied to the others, and from then on each of them decodes by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

import torch

from runtime.engine.casting import Casting
from runtime.engine.kv import KVCache
from runtime.engine.located import located
from runtime.engine.sampling import choose
from runtime.engine.sequence import Phase, Sequence
from runtime.errors import GreenroomError


class Speaking:
    """Lets sequences speak.

    Args:
        cache: gives slots.
        casting: gives a prompt's further choices the mixture of the first.
        eos_token_ids: tokens that end an answer.
        join: takes a further choice into the running batch.
    """

    def __init__(
        self,
        cache: KVCache,
        casting: Casting,
        *,
        eos_token_ids: tuple[int, ...],
        join: Callable[[Sequence], None],
    ) -> None:
        self._cache = cache
        self._casting = casting
        self._eos_token_ids = eos_token_ids
        self._join = join

    def acquire_slots(self, sequence: Sequence) -> bool:
        """Reserve a slot for each choice and start; False, and nothing is reserved, where they do not all fit now."""
        slots: list[int] = []
        for choice in sequence.choices:
            slot = self._cache.acquire(choice.num_tokens)
            if slot is None:
                for held in slots:
                    self._cache.release(held)
                return False
            slots.append(slot)
        for choice, slot in zip(sequence.choices, slots, strict=True):
            choice.start(slot)
        return True

    def speak(self, sequences: Items[Sequence], logits: torch.Tensor) -> int:
        """Add a token to every sequence, and to the further choices of those whose prompt is now complete.

        Args:
            sequences: B, decoding, or with a prompt that is now complete.
            logits: [B, V] float32.

        Returns:
            how many tokens that were; a prompt whose continuation was scored gets none, and ends.
        """
        speakers = [(row, speaker) for row, sequence in enumerate(sequences) for speaker in self._speakers(sequence)]
        if not speakers:
            return 0
        rows, speaking = zip(*speakers, strict=True)
        if rows != tuple(range(len(sequences))):
            logits = logits[list(rows)]
        tokens = choose([sequence.sampler for sequence in speaking], logits)
        for row, (sequence, chosen) in enumerate(zip(speaking, tokens, strict=True)):
            if isinstance(chosen, GreenroomError):
                sequence.fail(chosen)
            else:
                if sequence.request.keep_logits:
                    sequence.keep(logits[row])
                sequence.take(chosen, self._eos_token_ids)
        return len(speaking)

    def _speakers(self, sequence: Sequence) -> Items[Sequence]:
        """Who gets a token of what a sequence computed: itself, with its further choices, or nobody if it is scored."""
        if sequence.phase is Phase.DECODING:
            return (sequence,)
        sequence.emit(located(sequence))
        if sequence.request.continuation is not None:
            sequence.finish("scored")
            return ()
        sequence.phase = Phase.DECODING
        for choice in sequence.choices[1:]:
            self._split(sequence, choice)
        return sequence.choices

    def _split(self, leader: Sequence, choice: Sequence) -> None:
        self._cache.copy(leader.held_slot, choice.held_slot, len(leader.prompt))
        choice.phase = Phase.DECODING
        self._casting.share(leader, choice)
        self._join(choice)
