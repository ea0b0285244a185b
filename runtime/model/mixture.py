"""A mixture: for every layer the router and the experts it chooses from, of one task or of one request.

It knows nothing of files, nor of how the engine packs mixtures side by side.
Read first: a router has E columns, one per expert that it may use in its layer; `weigh` is the meaning of all kinds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from runtime.kernels.grouping import grouped_weights
from runtime.kernels.routing import top_k_weights
from runtime.model.hyper_sets import Hyper

MixtureKind = Literal["top_k", "arrow", "grouped", "fixed", "blend"]


@dataclass(frozen=True)
class LayerGroups:
    """The groups of a grouped router in one layer.

    Args:
        names: G of them.
        weight: W_G [G, D] float32.
        bias: [G] float32, the router's own and what a request adds.
        allowed: [G] bool: has an expert in this layer and is not masked.
        member: [E] int64, the group of a column; -1 for the general expert.
        share: lambda, the weight of all groups together.
        tau_group: temperature between groups.
        tau_expert: temperature within groups.
        epsilon: a group of less weight is skipped.
    """

    names: tuple[str, ...]
    weight: torch.Tensor
    bias: torch.Tensor
    allowed: torch.Tensor
    member: torch.Tensor
    share: float
    tau_group: float
    tau_expert: float
    epsilon: float


@dataclass(frozen=True)
class Router:
    """The router of one layer.

    Args:
        weight: [E, D] float32; row j scores the j-th expert: W, Arrow's prototypes, or W_D within groups.
        experts: digests of the visible experts, E of them.
        bias: [E] float32 added to the scores; None adds nothing.
        constant: [E] float32, weights that do not depend on the token; None for none.
        groups: of a grouped router.
        labels: per column the name of its group, "" where it has none; empty where there are no groups.
        parts: of a blend: each task's own router; the columns here are theirs, one part after the other.
    """

    weight: torch.Tensor
    experts: tuple[str, ...]
    bias: torch.Tensor | None = None
    constant: torch.Tensor | None = None
    groups: LayerGroups | None = None
    labels: tuple[str, ...] = ()
    parts: tuple[RouterPart, ...] = ()


@dataclass(frozen=True)
class RouterPart:
    """The router of one task among several that answer together.

    Args:
        share: lambda, what its weights are multiplied by.
        kind: how it weighs its own columns.
        top_k: K.
        router: its columns.
    """

    share: float
    kind: MixtureKind
    top_k: int
    router: Router


@dataclass(frozen=True)
class Mixture:
    """Router and visible set of one task, or what a request made of it (`runtime.model.control`).

    Args:
        task: its name.
        digest: identity for caches: SHA-256 over everything that decides what it computes, as length-prefixed fields.
        top_k: experts per token and layer, K.
        routers: layer -> router.
        kind: how the routers weigh.
        by_request: the weights are those of the whole prompt and must be fixed before it runs through the experts.
        variant: what a request made of it; empty for the task's own.
        hyper: adapters added to the FFNs by the chosen set; None adds nothing.
        blended: the tasks of a blend; empty for the mixture of one task.
    """

    task: str
    digest: str
    top_k: int
    routers: Mapping[int, Router]
    kind: MixtureKind = "top_k"
    by_request: bool = False
    variant: str = ""
    hyper: Hyper | None = None
    blended: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Whose visible sets it draws on."""
        return self.blended or (self.task,)


def weigh(router: Router, x: torch.Tensor, *, kind: MixtureKind, top_k: int) -> torch.Tensor:
    """Weights [T, E] float32 of the experts for tokens `x` [T, D].

    top_k    the K largest of softmax(W x), renormalised
    arrow    the same of |W x|
    grouped  lambda * grouped_weights, and 1 - lambda for the general expert
    fixed    `constant`, whatever x is
    blend    of each part what its kind says, times its share
    """
    if kind == "blend":
        own = [part.share * weigh(part.router, x, kind=part.kind, top_k=part.top_k) for part in router.parts]
        return torch.cat(own, dim=1)
    if kind == "fixed":
        assert router.constant is not None, "a fixed router has its weights"
        return router.constant.expand(x.shape[0], -1)
    logits = x.float() @ router.weight.t()
    if router.bias is not None:
        logits = logits + router.bias
    if kind == "grouped":
        assert router.groups is not None, "a grouped router has groups"
        weights = _grouped(router.groups, logits, x.float())
        return weights if router.constant is None else weights + router.constant
    k = torch.full((x.shape[0],), top_k, device=x.device)
    allowed = torch.ones_like(logits, dtype=torch.bool)
    return top_k_weights(logits.abs() if kind == "arrow" else logits, allowed, k, top_k)


def _grouped(groups: LayerGroups, logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    group_logits = (x @ groups.weight.t() + groups.bias) / groups.tau_group
    member = groups.member.clamp(min=0)
    allowed = (groups.member >= 0) & groups.allowed[member]
    weights = grouped_weights(
        group_logits,
        logits / groups.tau_expert,
        group_allowed=groups.allowed.expand_as(group_logits),
        allowed=allowed.expand_as(logits),
        member=member,
        epsilon=torch.full((x.shape[0],), groups.epsilon, device=x.device),
    )
    return groups.share * weights


def fields_digest(*fields: str) -> str:
    """SHA-256 over fields, each with its length before it, so that no two lists of fields give the same bytes."""
    hasher = hashlib.sha256()
    for field in fields:
        data = field.encode()
        hasher.update(len(data).to_bytes(8, "little") + data)
    return hasher.hexdigest()
