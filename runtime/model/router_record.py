"""What a manifest says of routers: their kind, their weights' blob, what they see, and their groups.

It does not know the weights (`runtime.model.routers`) nor the rest of the manifest.
Read first: a router keeps the groups that it was trained with; a manifest's own groups are for routers to come.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from runtime.model.record import Digest, Name, Record

RouterKind = Literal["top_k", "grouped", "arrow"]


class Group(Record):
    """A named group of expert sets, for routers that will be trained; a router's own groups are in its `Grouping`."""

    name: Name
    experts: Annotated[tuple[Digest, ...], Field(min_length=1)]


class Grouping(Record):
    """What a grouped router is beside its weights (AT-MoE, arXiv 2410.10896); formula: `runtime.kernels.grouping`.

    `groups` names the group of each visible expert set; `within` says whether the weights within a group depend on the
    input; `share` is lambda, and `general` the expert set that gets the rest of the weight, 1 - lambda.
    """

    groups: tuple[Name, ...]
    scope: Literal["token", "request"]
    within: Literal["input", "static"]
    tau_group: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    tau_expert: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    epsilon: Annotated[float, Field(ge=0, lt=1)]
    share: Annotated[float, Field(gt=0, le=1)]
    general: Digest | None

    @model_validator(mode="after")
    def _general_has_a_share(self) -> Self:
        if (self.general is None) != (self.share == 1):
            raise ValueError(f"share={self.share}: must be 1 without a general expert set, and below 1 with one")
        return self

    def names(self) -> tuple[str, ...]:
        """Every group once, in the order of the router's rows."""
        return tuple(dict.fromkeys(self.groups))


class RouterRef(Record):
    """A task's router: one weight [E, D] per layer; row j belongs to the j-th visible expert that has this layer.

    `top_k` experts are kept per token; a grouped router keeps all, so that its `top_k` is the number of visible sets.
    `usage` has for every layer with visible experts, ascending, the share of the router's weight that fell on each of
    them in training; None where that was not counted. It decides only what is read first.
    """

    kind: RouterKind
    digest: Digest
    top_k: Annotated[int, Field(ge=1)]
    visible: tuple[Digest, ...]
    grouping: Grouping | None = None
    usage: tuple[tuple[Annotated[float, Field(ge=0, le=1)], ...], ...] | None = None

    @model_validator(mode="after")
    def _kind_fits(self) -> Self:
        if (self.kind == "grouped") != (self.grouping is not None):
            raise ValueError(f"kind={self.kind}: exactly a grouped router has a grouping")
        if self.grouping is not None:
            count = len(self.visible)
            if not count or len(self.grouping.groups) != count or self.top_k != count:
                raise ValueError(f"kind=grouped: groups and top_k={self.top_k} must fit {count} visible expert sets")
            if self.grouping.general in self.visible:
                raise ValueError("general: must not be one of the visible expert sets")
        return self

    def all_experts(self) -> tuple[str, ...]:
        """Digests of the visible expert sets and of the general one."""
        general = self.grouping.general if self.grouping else None
        return self.visible if general is None else (*self.visible, general)
