"""Casting: which mixture a sequence gets, and how it comes by its experts.

It knows nothing of queues or tensors beyond the prompt's residual stream; the engine calls it on its own thread.
Read first: `decide` runs once per sequence, when its prompt has passed the base-only layers. A pinned task is known
earlier, so `pin` starts its loads while those layers run.
"""

from __future__ import annotations

import time
from typing import Literal

import torch

from runtime.engine.request import ExpertUse, Located, TaskScore
from runtime.engine.sequence import Phase, Sequence
from runtime.errors import GreenroomError
from runtime.memory.loader import Priority
from runtime.memory.memory import ExpertMemory
from runtime.model.locator import pool


class Casting:
    """Chooses mixtures and reserves their experts.

    Args:
        memory: gives the experts.

    `stall_s` sums the seconds in which sequences stood before the expert layers and waited.
    """

    def __init__(self, memory: ExpertMemory) -> None:
        self._memory = memory
        self.stall_s = 0.0

    def guess(self, sequence: Sequence, embedded: torch.Tensor) -> None:
        """On arrival: guess the task from the token embeddings [T, D] and start to read its visible set.

        Called on the thread that submits. The guess binds nobody: `decide` withdraws it where it was wrong.
        """
        request, generation = sequence.request, sequence.generation
        if request.task is not None or request.base_only or request.locate_only:
            return
        task = generation.arrival.locate(pool(embedded).unsqueeze(0).cpu())[0].task
        if task is not None:
            sequence.guessed_task = task
            sequence.guess = self._memory.prefetch(generation.visible_units(generation.mixtures[task]))

    def pin(self, sequence: Sequence) -> None:
        """Reserve the experts of a pinned task ahead of need; nothing happens for other requests."""
        task = sequence.request.task
        if task is not None:
            sequence.mixture = sequence.generation.mixtures[task]
            self._reserve(sequence, Priority.CONFIRMED)

    def decide(self, sequence: Sequence) -> None:
        """Fix the mixture of a sequence whose residual stream at the first expert layer is complete."""
        request = sequence.request
        sequence.phase = Phase.STAGING
        sequence.staging_since = time.monotonic()
        sequence.residual = [torch.cat(sequence.residual)]
        if request.task is None and not request.base_only:
            feature = pool(sequence.residual[0]).unsqueeze(0).cpu()
            sequence.decision = sequence.generation.locator.locate(feature)[0]
            if sequence.decision.task is not None:
                sequence.mixture = sequence.generation.mixtures[sequence.decision.task]
        if sequence.guess is not None and sequence.guessed_task != (sequence.mixture and sequence.mixture.task):
            sequence.guess.cancel()
        if request.locate_only:
            sequence.emit(self._located(sequence))
            sequence.finish("located")
        else:
            self.stage(sequence)

    def stage(self, sequence: Sequence) -> bool:
        """Reserve the experts of a sequence in STAGING and go on if they are there; True once they are reserved."""
        reserved = self._reserve(sequence, Priority.DEMAND)
        if sequence.reservation is not None and not sequence.reservation.ready:
            self._memory.hurry(sequence.reservation)
        self.enter(sequence)
        return reserved

    def missing_bytes(self, sequence: Sequence) -> int:
        """Bytes of the visible set that are not in memory."""
        if sequence.mixture is None:
            return 0
        return self._memory.missing_bytes(sequence.generation.visible_units(sequence.mixture))

    def enter(self, sequence: Sequence) -> None:
        """Let a sequence in STAGING into the expert layers if its experts are loaded; fail it if they cannot be."""
        if sequence.phase is not Phase.STAGING:
            return
        reservation = sequence.reservation
        if reservation is not None and reservation.error is not None:
            sequence.fail(reservation.error)
        elif sequence.mixture is None or (reservation is not None and reservation.ready):
            self.stall_s += time.monotonic() - sequence.staging_since if reservation is not None else 0.0
            sequence.emit(self._located(sequence))
            sequence.phase = Phase.MIXING

    def _reserve(self, sequence: Sequence, priority: Priority) -> bool:
        if sequence.mixture is None or sequence.request.locate_only:
            return True
        if sequence.reservation is None:
            try:
                units = sequence.generation.visible_units(sequence.mixture)
                sequence.reservation = self._memory.reserve(units, priority=priority)
            except GreenroomError as error:
                sequence.fail(error)
        return sequence.reservation is not None

    def _located(self, sequence: Sequence) -> Located:
        decision = sequence.decision
        return Located(
            task=sequence.mixture.task if sequence.mixture else None,
            how=_how(sequence),
            margin=decision.margin if decision else 0.0,
            scores=tuple(TaskScore(task, score) for task, score in decision.scores) if decision else (),
            generation=sequence.generation.manifest.generation,
            experts=self._uses(sequence),
        )

    def _uses(self, sequence: Sequence) -> tuple[ExpertUse, ...]:
        reservation = sequence.reservation
        if reservation is None:
            return ()
        uses = []
        for digest in dict.fromkeys(digest for digest, _ in reservation.keys):
            bytes_read = reservation.bytes_read(digest)
            use = ExpertUse(
                digest=digest,
                task=sequence.generation.manifest.expert_set(digest).task,
                num_layers=reservation.num_layers(digest),
                source="disk" if bytes_read else "host",
                bytes_read=bytes_read,
                load_s=reservation.load_s if bytes_read else 0.0,
            )
            uses.append(use)
        return tuple(uses)


def _how(sequence: Sequence) -> Literal["located", "pinned", "abstained", "base"]:
    if sequence.request.task is not None:
        return "pinned"
    if sequence.decision is None or not sequence.decision.scores:
        return "base"
    return "abstained" if sequence.decision.task is None else "located"
