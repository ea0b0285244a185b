"""What a user may choose about a grouped router: one frozen value, checked when it is made.

It does not know torch, experts or data.
Read first: every default is written here and nowhere else; `runtime.kernels.grouping` has the formula.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from runtime.errors import InvalidInputError

Scope = Literal["token", "request"]
Within = Literal["input", "static"]


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """How a grouped router weighs (AT-MoE, arXiv 2410.10896).

    Args:
        scope: what it reads: every token, or the prompt as a whole, once per request.
        within: whether weights within a group depend on what it reads, or are the same for all.
        tau_group: temperature between groups; lower is sharper.
        tau_expert: temperature within groups.
        epsilon: a group of less weight is skipped when serving; training skips none.
        share: lambda, the weight of all groups together; the general expert gets the rest.
        general: task whose own experts are the general ones; needed where `share` is below 1.

    Raises:
        InvalidInputError: a value is out of range; the message names field and value.
    """

    scope: Scope = "token"
    within: Within = "input"
    tau_group: float = 1.0
    tau_expert: float = 1.0
    epsilon: float = 0.01
    share: float = 1.0
    general: str | None = None

    def __post_init__(self) -> None:
        for field, choices in (("scope", get_args(Scope)), ("within", get_args(Within))):
            if getattr(self, field) not in choices:
                raise InvalidInputError(field, getattr(self, field), f"must be one of {', '.join(choices)}")
        for field in ("tau_group", "tau_expert"):
            if not (math.isfinite(getattr(self, field)) and getattr(self, field) > 0):
                raise InvalidInputError(field, getattr(self, field), "must be above 0")
        if not 0 <= self.epsilon < 1:
            raise InvalidInputError("epsilon", self.epsilon, "must be 0 or more, and below 1")
        if not 0 < self.share <= 1:
            raise InvalidInputError("share", self.share, "must be above 0 and at most 1")
        if (self.share < 1) != (self.general is not None):
            raise InvalidInputError("share", self.share, "is below 1 exactly where a general task is named")
