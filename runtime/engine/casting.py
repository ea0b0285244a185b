"""Casting: which mixture a sequence gets, and how it comes by its experts.

It knows nothing of queues or tensors beyond the prompt's residual stream; the engine calls it on its own thread.
Read first: a mixture is fixed once per sequence: at `begin` where the task is pinned, else at `decide`, when the prompt
has passed the base-only layers. Then the whole visible set is reserved at once, and read layer by layer: the prompt
enters a layer as soon as that layer's own experts are there.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from runtime.engine.direction import directed, settled
from runtime.engine.located import located
from runtime.engine.sequence import Phase, Sequence
from runtime.errors import GreenroomError, InvalidInputError, NoTaskNearError
from runtime.memory.loader import Priority
from runtime.memory.memory import ExpertMemory
from runtime.model.locator import pool


class Casting:
    """Chooses mixtures and reserves their experts.

    Args:
        memory: gives the experts.
        first_layer: the first layer with experts.
        num_layers: of the model.
        embed: token ids -> token embeddings [T, D].

    `stall_s` sums the seconds in which prompts stood before a layer and waited for its experts.
    """

    def __init__(
        self,
        memory: ExpertMemory,
        *,
        first_layer: int,
        num_layers: int,
        embed: Callable[[list[int]], torch.Tensor],
    ) -> None:
        self._memory = memory
        self._first_layer = first_layer
        self._num_layers = num_layers
        self._embed = embed
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

    def begin(self, sequence: Sequence) -> None:
        """Fix the mixture of a sequence that has just left the queue, where its request names it."""
        request = sequence.request
        if request.locate_only or (request.task is None and not request.base_only):
            return
        mixture = sequence.generation.mixtures[request.task] if request.task is not None else None
        if mixture is not None and mixture.by_request:  # fixed at `decide`; its experts may be read before
            mixture = directed(request, mixture)
            assert mixture is not None, "a direction makes a mixture of a mixture"
            sequence.guessed_task = mixture.task
            sequence.guess = self._memory.prefetch(sequence.generation.visible_units(mixture))
        else:
            self._fix(sequence, request.task)

    def decide(self, sequence: Sequence) -> None:
        """Fix the mixture of a sequence whose prompt has passed the base-only layers, and that has none yet."""
        request = sequence.request
        task = request.task
        if task is None and not request.base_only:
            feature = pool(self._seen(sequence)).unsqueeze(0).cpu()
            sequence.decision = sequence.generation.locator.locate(feature)[0]
            task = sequence.decision.task or request.default_task
            if task is None and request.abstain_fails:
                sequence.fail(NoTaskNearError("no task is near enough to the prompt"))
                return
        if sequence.guess is not None and sequence.guessed_task != task:
            sequence.guess.cancel()
        self._fix(sequence, task)
        if request.locate_only and sequence.phase is not Phase.ENDED:
            sequence.emit(located(sequence))
            sequence.finish("located")

    def _seen(self, sequence: Sequence) -> torch.Tensor:
        """The residual stream [T, D] of the context, where the locator reads it."""
        if sequence.generation.manifest.locator.layer == 0:
            return self._embed(sequence.prompt[: sequence.num_context])
        residual = sequence.context_residual
        assert residual is not None, "the residual stream is kept between two ranges"
        return residual

    def stage(self, sequence: Sequence) -> bool:
        """Reserve the experts of a sequence that awaits them; True once they are reserved, and are being read."""
        assert sequence.mixture is not None, "only a mixture has experts"
        units = sequence.generation.visible_units(sequence.mixture)
        priority = Priority.DEMAND if sequence.layers_done >= self._first_layer else Priority.CONFIRMED
        try:
            sequence.reservation = self._memory.reserve(units, priority=priority)
        except GreenroomError as error:
            sequence.fail(error)
        sequence.awaits_experts = sequence.reservation is None and sequence.phase is Phase.PROMPT
        return sequence.reservation is not None

    def layers_ready(self, sequence: Sequence) -> int:
        """How many layers a prompt may pass by now: up to the first that lacks an expert of its visible set.

        Where that is none at all, its reads overtake all that nobody waits for, and the time counts as a stall.
        """
        reservation = sequence.reservation
        if not sequence.decided:
            ready = max(1, sequence.generation.manifest.locator.layer)
        elif sequence.awaits_experts:
            ready = self._first_layer
        else:
            missing = reservation.next_missing_layer() if reservation is not None else None
            ready = self._num_layers if missing is None else missing
        now = time.monotonic()
        if sequence.stalled_since is not None:
            self.stall_s += now - sequence.stalled_since
        elif ready <= sequence.layers_done and reservation is not None:
            self._memory.hurry(reservation)
        sequence.stalled_since = now if ready <= sequence.layers_done else None
        return ready

    def share(self, leader: Sequence, choice: Sequence) -> None:
        """Give another answer to the prompt of `leader`, which is complete, the same mixture."""
        choice.decision, choice.mixture, choice.decided = leader.decision, leader.mixture, True
        if choice.mixture is not None:
            shared = self.stage(choice)
            assert shared or choice.phase is Phase.ENDED, "what the leader holds can be reserved again"

    def missing_bytes(self, sequence: Sequence) -> int:
        """Bytes of the visible set that are not in memory."""
        if sequence.mixture is None:
            return 0
        return self._memory.missing_bytes(sequence.generation.visible_units(sequence.mixture))

    def check(self, sequence: Sequence) -> None:
        """Fail a sequence whose experts cannot be loaded."""
        if sequence.reservation is not None and sequence.reservation.error is not None:
            sequence.fail(sequence.reservation.error)

    def _fix(self, sequence: Sequence, task: str | None) -> None:
        sequence.decided = True
        sequence.decided_at = time.monotonic()
        if task is not None:
            sequence.mixture = sequence.generation.mixtures[task]
        try:
            sequence.mixture = settled(directed(sequence.request, sequence.mixture), sequence.context_residual)
        except InvalidInputError as error:
            sequence.fail(error)
        else:
            sequence.awaits_experts = sequence.mixture is not None and not sequence.request.locate_only
