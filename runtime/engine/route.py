"""Who is to answer, as a request says it: which of its wishes exclude each other, and the shares of several tasks.

It knows nothing of repertoires: whether a task exists is checked when a request arrives.
Read first: weights are relative; shares are the weights over their sum, and a task of weight 0 has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from runtime.errors import InvalidInputError

if TYPE_CHECKING:
    from runtime.engine.request import Request

MAX_GROUP_BIAS = 100.0
MAX_TASK_WEIGHTS = 8


def check_route(request: Request) -> None:
    """Refuse wishes that exclude each other or mean nothing.

    Raises:
        InvalidInputError: there is one.
    """
    if request.base_only and request.task is not None:
        raise InvalidInputError("task", request.task, "cannot be pinned together with base_only")
    if request.default_task is not None and request.abstain_fails:
        raise InvalidInputError("default_task", request.default_task, "excludes abstain_fails")
    if request.base_only or request.locate_only:
        how = "base_only" if request.base_only else "locate_only"
        for name in ("group_bias", "group_mask", "explain", "task_weights"):
            if getattr(request, name):
                raise InvalidInputError(name, getattr(request, name), f"means nothing together with {how}")
    for group, shift in request.group_bias.items():
        if not -MAX_GROUP_BIAS <= shift <= MAX_GROUP_BIAS:
            raise InvalidInputError(f"group_bias[{group}]", shift, f"must be within +-{MAX_GROUP_BIAS:g}")
    if request.task_weights:
        _check_task_weights(request)


def shares(weights: Mapping[str, float]) -> dict[str, float]:
    """`lambda_t = w_t / sum(w)` of the tasks with a weight above 0, in order of their names."""
    total = sum(weights.values())
    return {task: weight / total for task, weight in sorted(weights.items()) if weight > 0}


def _check_task_weights(request: Request) -> None:
    weights = request.task_weights
    for name in ("task", "default_task", "abstain_fails", "group_bias", "group_mask"):
        if getattr(request, name):
            raise InvalidInputError("task_weights", dict(weights), f"excludes {name}")
    if len(weights) > MAX_TASK_WEIGHTS:
        raise InvalidInputError("task_weights", len(weights), f"at most {MAX_TASK_WEIGHTS} tasks")
    for task, weight in weights.items():
        if not (math.isfinite(weight) and 0 <= weight <= 1e6):
            raise InvalidInputError(f"task_weights[{task}]", weight, "must be between 0 and 1e6")
    if sum(weights.values()) < 1e-6:
        raise InvalidInputError("task_weights", dict(weights), "must not all be zero")
