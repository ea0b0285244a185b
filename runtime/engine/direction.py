"""Direction: what a request says of how its mixture is to weigh, and what that makes of a task's mixture.

It knows nothing of loading or scheduling.
Read first: names of groups are checked when a request arrives, as far as they can be: which router it gets is decided
later, and a request whose router cannot follow is refused then, never answered as if nothing had been said.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runtime.engine.request import Request
from runtime.errors import InvalidInputError
from runtime.model.blend import blended
from runtime.model.control import controlled, fixed_for, summary
from runtime.model.generation import Generation
from runtime.model.mixture import Mixture


def check_direction(request: Request, generation: Generation) -> None:
    """Refuse what no router can follow, or the router of the pinned task cannot.

    Raises:
        InvalidInputError: an unknown group, a masked mixture, a pinned task without groups, or weights for a task that
            cannot be blended.
        UnknownTaskError, RepertoireError: a named task does not exist or is quarantined.
    """
    for task in (*request.task_weights, *request.named_tasks):
        generation.check_task(task)
    if len(request.named_tasks) > 1:
        for task in request.named_tasks:
            if generation.manifest.task(task).hyper is not None:
                raise InvalidInputError("task_weights", task, "has hyper-adapters and cannot be blended")
    if not (request.group_bias or request.group_mask):
        return
    if request.task is not None:
        directed(request, generation.read_mixture(request.task))
        return
    groupings = (task.router.grouping for task in generation.manifest.tasks)
    known = {name for grouping in groupings if grouping is not None for name in grouping.names()}
    for field, names in (("group_bias", request.group_bias), ("group_mask", request.group_mask)):
        for name in names:
            if name not in known:
                raise InvalidInputError(field, name, f"the groups of this repertoire are {sorted(known)}")


def directed(request: Request, mixture: Mixture | None) -> Mixture | None:
    """A task's mixture as the request wants it.

    Raises:
        InvalidInputError: the mixture has no such groups, or there is no mixture.
    """
    if mixture is not None:
        return controlled(mixture, request.group_bias, request.group_mask)
    for field, names in (("group_bias", request.group_bias), ("group_mask", request.group_mask)):
        if names:
            raise InvalidInputError(field, sorted(names), "no task was found for this prompt, so there are no groups")
    return None


def cast_together(request: Request, mixtures: Sequence[Mixture], residual: torch.Tensor | None) -> Mixture:
    """What a request makes of the mixtures of its tasks, one or several; `residual` [T, D] enters the experts.

    Args:
        request: says which groups count, or names the tasks and their weights.
        mixtures: in any order.
        residual: of the whole prompt; needed where a mixture weighs whole prompts.

    Raises:
        InvalidInputError: a mixture has no such groups.
    """
    own = [settled(controlled(mixture, request.group_bias, request.group_mask), residual) for mixture in mixtures]
    weights = request.named_tasks
    return own[0] if len(own) == 1 else blended([(weights[each.task], each) for each in own])


def settled(mixture: Mixture, residual: torch.Tensor | None) -> Mixture:
    """A mixture that weighs whole prompts, with its weights for this one; `residual` [T, D] enters the experts."""
    if not mixture.by_request:
        return mixture
    assert residual is not None, "whole prompts are weighed where they enter the experts"
    return fixed_for(mixture, summary(residual).cpu())
