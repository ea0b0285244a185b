"""Which sequences do what in the next step; plain Python without tensors.

It knows nothing of models. KV slots and expert reservations are acquired through two callables.
Read first: a sequence first gets KV for all tokens it may ever have, then experts for its whole visible set. One that
holds both never waits again, and one that waits for experts holds none; so whatever runs can end, and no cycle of
waiting can form. A request that does not fit is passed by later ones at most `max_passes` times; then all wait for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from runtime.engine.sequence import Phase, Sequence


@dataclass(frozen=True)
class Step:
    """The work of one step.

    Args:
        decode: sequences that get one more token.
        base: (sequence, tokens) of prompts to run through the base-only layers.
        mixing: (sequence, tokens) of prompts to run through the expert layers.
    """

    decode: tuple[Sequence, ...]
    base: tuple[tuple[Sequence, int], ...]
    mixing: tuple[tuple[Sequence, int], ...]

    @property
    def empty(self) -> bool:
        """Nothing to run."""
        return not (self.decode or self.base or self.mixing)


class Scheduler:
    """Queue and running set.

    Args:
        acquire_slot: gives a sequence its KV slot and returns True, or returns False if it does not fit now.
        stage: tries to reserve the experts of a sequence in STAGING; returns True once they are reserved.
        max_step_tokens: prompt and decode tokens of one step, at most (decoding always goes first).
        max_passes: how often a waiting sequence may be passed by later ones.
    """

    def __init__(
        self,
        *,
        acquire_slot: Callable[[Sequence], bool],
        stage: Callable[[Sequence], bool],
        max_step_tokens: int,
        max_passes: int,
    ) -> None:
        self._acquire_slot = acquire_slot
        self._stage = stage
        self._max_step_tokens = max_step_tokens
        self._max_passes = max_passes
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def all(self) -> Iterator[Sequence]:
        """Every sequence that has not ended."""
        yield from [*self.running, *self.waiting]

    def sweep(self) -> None:
        """Forget sequences that have ended."""
        self.running = [sequence for sequence in self.running if sequence.phase is not Phase.ENDED]
        if any(sequence.phase is Phase.ENDED for sequence in self.waiting):
            self.waiting = deque(sequence for sequence in self.waiting if sequence.phase is not Phase.ENDED)

    def schedule(self) -> Step:
        """Admit what fits, then fill the step: decoding first, then expert layers, then base layers of prompts."""
        self._pass_by(list(self.waiting), self._acquire_slot)
        self.running += [sequence for sequence in self.waiting if sequence.phase is Phase.BASE]
        self.waiting = deque(sequence for sequence in self.waiting if sequence.phase is Phase.WAITING)
        self._pass_by([s for s in self.running if s.phase is Phase.STAGING and s.reservation is None], self._stage)
        decode = tuple(sequence for sequence in self.running if sequence.phase is Phase.DECODING)
        left = max(1, self._max_step_tokens - len(decode))
        mixing, left = self._fill(Phase.MIXING, lambda sequence: sequence.mixed_done, left)
        base, _ = self._fill(Phase.BASE, lambda sequence: sequence.base_done, left)
        return Step(decode, base, mixing)

    def _fill(
        self, phase: Phase, done: Callable[[Sequence], int], left: int
    ) -> tuple[tuple[tuple[Sequence, int], ...], int]:
        parts = []
        for sequence in self.running:
            if sequence.phase is phase and left > 0:
                length = min(left, len(sequence.prompt) - done(sequence))
                parts.append((sequence, length))
                left -= length
        return tuple(parts), left

    def _pass_by(self, candidates: Iterable[Sequence], admit: Callable[[Sequence], bool]) -> None:
        """Try candidates in order; those that do not fit may be passed by, but not for ever."""
        blocked: list[Sequence] = []
        for sequence in candidates:
            if admit(sequence):
                for earlier in blocked:
                    earlier.times_passed += 1
            elif sequence.phase is not Phase.ENDED:
                blocked.append(sequence)
            if any(earlier.times_passed >= self._max_passes for earlier in blocked):
                return
