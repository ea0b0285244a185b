"""Which sequences do what in the next step; plain Python without tensors.

It knows nothing of models. KV slots and expert reservations are acquired through two callables.
Read first: a sequence first gets KV for all tokens it may ever have, then experts for its whole visible set. One that
holds both never waits again, and one that waits for experts holds none; so whatever runs can end, and no cycle of
waiting can form. A request that does not fit is passed by later ones at most `max_passes` times; then all wait for it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from runtime.engine.options import Policy
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
        max_passes: how often a waiting sequence may be passed by later ones; then it is starved, and all wait for it.
        policy: who is tried first: "fcfs" in order of arrival, "locality" whose experts lack the fewest bytes in
            memory, "fair" whose task has the fewest sequences running.
        missing_bytes: of a sequence's experts, those not in memory; for "locality".
    """

    def __init__(
        self,
        *,
        acquire_slot: Callable[[Sequence], bool],
        stage: Callable[[Sequence], bool],
        max_step_tokens: int,
        max_passes: int,
        policy: Policy = "fcfs",
        missing_bytes: Callable[[Sequence], int] = lambda _sequence: 0,
    ) -> None:
        self._acquire_slot = acquire_slot
        self._stage = stage
        self._max_step_tokens = max_step_tokens
        self._max_passes = max_passes
        self._policy = policy
        self._missing_bytes = missing_bytes
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
        self._admit(list(self.waiting), self._acquire_slot)
        self.running += [sequence for sequence in self.waiting if sequence.phase is Phase.BASE]
        self.waiting = deque(sequence for sequence in self.waiting if sequence.phase is Phase.WAITING)
        self._admit([s for s in self.running if s.phase is Phase.STAGING and s.reservation is None], self._stage)
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

    def _admit(self, candidates: list[Sequence], admit: Callable[[Sequence], bool]) -> None:
        """Try candidates, given in order of arrival; those that do not fit may be passed by, but not for ever.

        The order is the policy's, except that starved ones come first; while one of them does not fit, nobody else
        gets in, so what it needs drains.
        """
        arrived = {sequence: place for place, sequence in enumerate(candidates)}
        left = dict(arrived)
        for sequence in self._ordered(candidates):
            starved = sequence.times_passed >= self._max_passes
            if admit(sequence):
                place = left.pop(sequence)
                for other, earlier in left.items():
                    other.times_passed += earlier < place
            elif sequence.phase is Phase.ENDED:
                del left[sequence]
            elif starved:
                return

    def _ordered(self, candidates: list[Sequence]) -> list[Sequence]:
        starved = [sequence for sequence in candidates if sequence.times_passed >= self._max_passes]
        others = [sequence for sequence in candidates if sequence.times_passed < self._max_passes]
        if self._policy == "locality":
            others.sort(key=self._missing_bytes)
        elif self._policy == "fair":
            running = Counter(_task(sequence) for sequence in self.running if sequence.reservation is not None)
            others.sort(key=lambda sequence: running[_task(sequence)])
        return [*starved, *others]


def _task(sequence: Sequence) -> str | None:
    return sequence.mixture.task if sequence.mixture else None
