"""Which sequences do what in the next step; plain Python without tensors.

It knows nothing of models. KV slots and expert reservations are acquired through callables.
Read first: a sequence first gets KV for all tokens it may ever have, then experts for its whole visible set. One that
holds both waits for nothing but reads from disk, and one that waits for experts holds none; so whatever runs can end,
and no cycle of waiting can form. A request that does not fit is passed by later ones at most `max_passes` times; then
all wait for it. A prompt runs through a range of layers at a time, up to the first layer whose experts are not there.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator

from runtime.engine.options import Policy
from runtime.engine.sequence import Phase, Sequence
from runtime.engine.step import PromptPart, Step


class Scheduler:
    """Queue and running set.

    Args:
        acquire_slot: gives a sequence its KV slot and returns True, or returns False if it does not fit now.
        stage: tries to reserve the experts of a sequence that awaits them; returns True once they are reserved.
        layers_ready: how many layers a prompt may pass by now; its whole model once all its experts are there.
        max_step_tokens: prompt and decode tokens of one step, at most (decoding always goes first).
        max_passes: how often a waiting sequence may be passed by later ones; then it is starved, and all wait for it.
        policy: who is tried first: "fcfs" in order of arrival, "locality" whose experts lack the fewest bytes in
            memory, "fair" whose tenant, then whose task, has the fewest sequences running. A request's priority comes
            before all of them.
        missing_bytes: of a sequence's experts, those not in memory; for "locality".
    """

    def __init__(
        self,
        *,
        acquire_slot: Callable[[Sequence], bool],
        stage: Callable[[Sequence], bool],
        layers_ready: Callable[[Sequence], int],
        max_step_tokens: int,
        max_passes: int,
        policy: Policy = "fcfs",
        missing_bytes: Callable[[Sequence], int] = lambda _sequence: 0,
    ) -> None:
        self._acquire_slot = acquire_slot
        self._stage = stage
        self._layers_ready = layers_ready
        self._max_step_tokens = max_step_tokens
        self._max_passes = max_passes
        self._policy = policy
        self._missing_bytes = missing_bytes
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def join(self, sequence: Sequence) -> None:
        """Take in a sequence that holds all it needs already."""
        self.running.append(sequence)

    def all(self) -> Iterator[Sequence]:
        """Every sequence that has not ended."""
        yield from [*self.running, *self.waiting]

    def sweep(self) -> None:
        """Forget sequences that have ended."""
        self.running = [sequence for sequence in self.running if sequence.phase is not Phase.ENDED]
        if any(sequence.phase is Phase.ENDED for sequence in self.waiting):
            self.waiting = deque(sequence for sequence in self.waiting if sequence.phase is not Phase.ENDED)

    def schedule(self) -> Step:
        """Admit what fits, then fill the step: decoding first, then prompts, the one nearest to its end first."""
        self._admit(list(self.waiting), self._acquire_slot)
        self.running += [sequence for sequence in self.waiting if sequence.phase is Phase.PROMPT]
        self.waiting = deque(sequence for sequence in self.waiting if sequence.phase is Phase.WAITING)
        self._admit([sequence for sequence in self.running if sequence.awaits_experts], self._stage)
        decode = tuple(sequence for sequence in self.running if sequence.phase is Phase.DECODING)
        return Step(decode, tuple(self._parts(max(1, self._max_step_tokens - len(decode)))))

    def _parts(self, left: int) -> Iterator[PromptPart]:
        prompts = [sequence for sequence in self.running if sequence.phase is Phase.PROMPT]
        for sequence in sorted(prompts, key=lambda sequence: -sequence.layers_done):
            if sequence.tokens_done == sequence.tokens_skipped:
                sequence.range_end = self._layers_ready(sequence)
            if left > 0 and sequence.range_end > sequence.layers_done:
                length = min(left, len(sequence.prompt) - sequence.tokens_done)
                layers = range(sequence.layers_done, sequence.range_end)
                yield PromptPart(sequence, sequence.tokens_done, length, layers)
                left -= length

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
            tasks = Counter(sequence.task for sequence in self.running if sequence.reservation is not None)
            tenants = Counter(sequence.request.tenant for sequence in self.running)
            others.sort(key=lambda sequence: (tenants[sequence.request.tenant], tasks[sequence.task]))
        others.sort(key=lambda sequence: sequence.request.priority)
        return [*starved, *others]
