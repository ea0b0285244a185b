"""Casting: which mixture a sequence gets, and how it comes by its experts.

It knows nothing of queues or tensors beyond the prompt's residual stream; the engine calls it on its own thread.
Read first: a task is fixed once per sequence: at `begin` where it is pinned, else at `decide`, when the prompt has
passed the base-only layers. Then its whole visible set is reserved at once, routers and experts, and read layer by
layer: the prompt enters a layer as soon as that layer's own experts are there. Only where the request changes what is
visible or blends several tasks, or the weights are those of the whole prompt, the routers come alone first, and the
experts that are left then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import torch

from runtime.engine.direction import cast_together, directed
from runtime.engine.located import located
from runtime.engine.sequence import Phase, Sequence
from runtime.errors import GreenroomError, InvalidInputError, NoTaskNearError
from runtime.memory.loader import Priority
from runtime.memory.memory import ExpertMemory
from runtime.memory.reservation import Prefetch
from runtime.memory.visible import VisibleSets
from runtime.memory.wanted import VisibleSet
from runtime.model.locator import parts, pool


class Casting:
    """Chooses mixtures and reserves their experts.

    Args:
        memory: gives routers and experts.
        visible: says what a task wants in memory.
        first_layer: the first layer with experts.
        num_layers: of the model.
        embed: token ids -> token embeddings [T, D].

    `stall_s` sums the seconds in which prompts stood before a layer and waited for its experts.
    """

    def __init__(
        self,
        memory: ExpertMemory,
        visible: VisibleSets,
        *,
        first_layer: int,
        num_layers: int,
        embed: Callable[[list[int]], torch.Tensor],
    ) -> None:
        self._memory = memory
        self._visible = visible
        self._first_layer = first_layer
        self._num_layers = num_layers
        self._embed = embed
        self.stall_s = 0.0

    def guess(self, sequence: Sequence) -> None:
        """On arrival: guess the task from the token embeddings and start to read its visible set.

        Called on a thread of its own, while the engine may have the sequence already, or have ended it. The guess
        binds nobody: `decide` withdraws it where it was wrong, or this does where it comes too late.
        """
        request, generation = sequence.request, sequence.generation
        if request.named_tasks or request.base_only or request.locate_only:
            return
        if not generation.densities.are_read:
            return  # a guess is worth no waiting
        embedded = self._embed(sequence.prompt[: sequence.num_context])
        task = generation.arrival.locate(pool(embedded).unsqueeze(0).cpu())[0].task
        if task is None or sequence.decided:
            return
        with suppress(GreenroomError):  # a task that cannot be served is no guess
            guess = self._guess(sequence, (task,))
            # The engine's thread first writes what is read here, and then looks for a guess; so one of the two sees it.
            wrong = sequence.decided and sequence.task != task
            if sequence.phase is Phase.ENDED or wrong or sequence.reservation is not None:
                guess.cancel()

    def begin(self, sequence: Sequence) -> None:
        """Fix the task of a sequence that has just left the queue, where its request names it, or several."""
        request, tasks = sequence.request, tuple(sequence.request.named_tasks)
        if request.locate_only or not (tasks or request.base_only):
            return
        if tasks and _is_made_to_measure(sequence, tasks):
            self._guess(sequence, tasks)  # experts may be read before it is known which are left
        self._fix(sequence, " + ".join(tasks) or None)

    def decide(self, sequence: Sequence) -> None:
        """Fix the mixture of a sequence whose prompt has passed the base-only layers, and that has none yet."""
        request = sequence.request
        task = request.task
        if task is None and not request.base_only:
            feature = self._feature(sequence).unsqueeze(0).cpu()
            sequence.decision = sequence.generation.locator.locate(feature)[0]
            task = sequence.decision.task or request.default_task
            if task is None and request.abstain_fails:
                sequence.fail(NoTaskNearError("no task is near enough to the prompt"))
                return
        self._fix(sequence, task)
        if sequence.guess is not None and sequence.guessed_task != task:
            sequence.guess.cancel()
        if request.locate_only and sequence.phase is not Phase.ENDED:
            sequence.emit(located(sequence))
            sequence.finish("located")

    def _feature(self, sequence: Sequence) -> torch.Tensor:
        """Of the context, as its generation's locator takes it."""
        seen = self._seen(sequence)
        if sequence.generation.manifest.locator.feature == "residual_mean":
            return pool(seen)
        return parts(seen, self._embed(sequence.prompt[: sequence.num_context]))

    def _seen(self, sequence: Sequence) -> torch.Tensor:
        """The residual stream [T, D] of the context, where the locator reads it."""
        if sequence.generation.manifest.locator.layer == 0:
            return self._embed(sequence.prompt[: sequence.num_context])
        residual = sequence.context_residual
        assert residual is not None, "the residual stream is kept between two ranges"
        return residual

    def stage(self, sequence: Sequence) -> bool:
        """Reserve what a sequence awaits; True once it is reserved, and is being read."""
        priority = Priority.DEMAND if sequence.layers_done >= self._first_layer else Priority.CONFIRMED
        try:
            visible = self._wanted(sequence)
            sequence.reservation = self._memory.reserve(visible, priority=priority, tenant=sequence.request.tenant)
        except GreenroomError as error:
            sequence.fail(error)
        sequence.awaits_experts = sequence.reservation is None and sequence.phase is not Phase.ENDED
        if sequence.reservation is not None and sequence.guess is not None and _is_whole(sequence):
            sequence.guess.cancel()  # what it named beyond that is not needed
        if sequence.reservation is not None and sequence.mixture is None:
            self._take_mixture(sequence)
            return self.stage(sequence) if sequence.awaits_experts else True
        return sequence.reservation is not None

    def layers_ready(self, sequence: Sequence) -> int:
        """How many layers a prompt may pass by now: up to the first that lacks an expert of its visible set.

        Where that is none at all, its reads overtake all that nobody waits for, and the time counts as a stall.
        """
        reservation = sequence.reservation
        if not sequence.decided or sequence.awaits_experts or (sequence.task is not None and sequence.mixture is None):
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
        choice.decision, choice.task, choice.mixture = leader.decision, leader.task, leader.mixture
        choice.decided = True
        if choice.mixture is not None:
            shared = self.stage(choice)
            assert shared or choice.phase is Phase.ENDED, "what the leader holds can be reserved again"

    def missing_bytes(self, sequence: Sequence) -> int:
        """Bytes of the visible set that are not in memory."""
        if sequence.task is None or not sequence.generation.faults.keys().isdisjoint(sequence.tasks):
            return 0
        return self._memory.missing_bytes(self._wanted(sequence))

    def check(self, sequence: Sequence) -> None:
        """Fail a sequence whose experts cannot be loaded; note the routers that have come."""
        if sequence.reservation is None:
            return
        if sequence.reservation.error is not None:
            sequence.fail(sequence.reservation.error)
        elif sequence.mixture is None:
            self._take_mixture(sequence)

    def _guess(self, sequence: Sequence, tasks: tuple[str, ...]) -> Prefetch:
        sequence.guessed_task = " + ".join(tasks)
        visible = self._visible.of_all(sequence.generation, tasks)
        guess = sequence.guess = self._memory.prefetch(visible, tenant=sequence.request.tenant)
        return guess

    def _fix(self, sequence: Sequence, task: str | None) -> None:
        sequence.decided_at = time.monotonic()
        sequence.task = task
        sequence.decided = True
        if task is not None:
            sequence.awaits_experts = not sequence.request.locate_only
            return
        try:
            directed(sequence.request, None)
        except InvalidInputError as error:
            sequence.fail(error)

    def _wanted(self, sequence: Sequence) -> VisibleSet:
        generation, tasks = sequence.generation, sequence.tasks
        assert tasks, "only a task has experts"
        if sequence.mixture is not None:
            return self._visible.of_mixture(generation, sequence.mixture)
        alone = _is_made_to_measure(sequence, tasks)
        return self._visible.routers_of(generation, tasks) if alone else self._visible.of(generation, tasks[0])

    def _take_mixture(self, sequence: Sequence) -> None:
        """The routers may have come: compute with them, or with what the request makes of them."""
        assert sequence.reservation is not None, "routers come with a reservation"
        if not _is_made_to_measure(sequence, sequence.tasks):
            sequence.mixture = sequence.reservation.mixture()
            return
        mixtures = sequence.reservation.mixtures()
        if mixtures is not None and sequence.layers_done >= self._first_layer:
            try:
                sequence.mixture = cast_together(sequence.request, mixtures, sequence.context_residual)
            except InvalidInputError as error:
                sequence.fail(error)
                return
            sequence.reservation.release()
            sequence.reservation, sequence.awaits_experts = None, True


def _is_whole(sequence: Sequence) -> bool:
    """Whether what is reserved now is all that the sequence can touch, and not routers that will tell the rest."""
    return sequence.mixture is not None or not _is_made_to_measure(sequence, sequence.tasks)


def _is_made_to_measure(sequence: Sequence, tasks: tuple[str, ...]) -> bool:
    """Whether the request, or the whole prompt, decides which of the tasks' experts are left, or how they add up."""
    groupings = [sequence.generation.manifest.task(task).router.grouping for task in tasks]
    by_request = any(grouping is not None and grouping.scope == "request" for grouping in groupings)
    return by_request or len(tasks) > 1 or bool(sequence.request.group_bias or sequence.request.group_mask)
