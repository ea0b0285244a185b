"""The routers of all running mixtures in one layer, packed side by side, and the weights they give to a step's tokens.

It knows nothing of the experts' weights.
Read first: a column is one expert as one mixture sees it; row r > 0 is a mixture, row 0 the plain base model, whose
weights are all zero. Each kind of router weighs its own columns, and the weights of all kinds are added. Inside, a row
is a part: a mixture's one router, or one of those that a blend adds up by their shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.kernels.grouping import grouped_weights
from runtime.kernels.routing import top_k_weights
from runtime.model.mixture import LayerGroups, Mixture, MixtureKind, Router, RouterPart


@dataclass(frozen=True)
class StagedColumn:
    """One column: an expert as one mixture sees it.

    Args:
        row: of the mixture.
        expert: digest.
        group: name of its group, "" where there is none.
    """

    row: int
    expert: str
    group: str


@dataclass(frozen=True)
class StagedRow:
    """How one part of the mixture `row` weighs here; its columns: `begin .. end`, its groups: `first_group ..`."""

    row: int
    part: int
    kind: MixtureKind
    top_k: int
    begin: int
    end: int
    first_group: int
    last_group: int
    router: Router


@dataclass(frozen=True)
class StagedGroups:
    """The groups of all grouped parts, side by side: G of them in all.

    Args:
        weight: W_G / tau_g [G, D] float32.
        bias: [G], the router's, with what the request adds, / tau_g.
        allowed: [1 + N, G] bool.
        columns: [1 + N, C] bool, the columns that are in one of a part's open groups.
        member: [C] int64.
        share: [1 + N], lambda.
        epsilon: [1 + N].
    """

    weight: torch.Tensor
    bias: torch.Tensor
    allowed: torch.Tensor
    columns: torch.Tensor
    member: torch.Tensor
    share: torch.Tensor
    epsilon: torch.Tensor


@dataclass(frozen=True)
class StagedParts:
    """Of each row of a step its at most P parts: `parts` [1 + M, P] int64, 0 for none, with `shares` [1 + M, P]."""

    parts: torch.Tensor
    shares: torch.Tensor


@dataclass(frozen=True)
class StagedRouter:
    """C columns of M mixtures in N >= M parts.

    Args:
        columns: what each column is.
        rows: how each part weighs that has a router here.
        weight: [C, D] float32, W_D / tau_d for grouped rows.
        bias: [C] float32; None where all are zero.
        chosen: [1 + N, C] bool, the columns of parts that keep the K largest.
        top_k: [1 + N] int64.
        k_max: the largest of them; 0 where no row keeps the K largest.
        absolute: [C] bool, Arrow's columns; None where there are none.
        constant: [1 + N, C] float32, weights that do not depend on the token; None where all are zero.
        groups: of grouped parts; None where there are none.
        blends: None where every mixture is one part, so that rows are parts.
    """

    columns: tuple[StagedColumn, ...]
    rows: tuple[StagedRow, ...]
    weight: torch.Tensor
    bias: torch.Tensor | None
    chosen: torch.Tensor
    top_k: torch.Tensor
    k_max: int
    absolute: torch.Tensor | None
    constant: torch.Tensor | None
    groups: StagedGroups | None
    blends: StagedParts | None

    def span(self, row: int) -> slice | None:
        """The columns of a mixture; None where it has no router here."""
        own = [staged for staged in self.rows if staged.row == row]
        return slice(own[0].begin, own[-1].end) if own else None

    def weigh(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Weights [T, C] float32 of the tokens `x` [T, D]; `rows` [T] names each token's mixture."""
        x = x.float()
        logits = x @ self.weight.t()
        if self.bias is not None:
            logits += self.bias
        if self.blends is None:
            return self._weigh_parts(x, logits, rows)
        weights = torch.zeros_like(logits)
        for parts, shares in zip(self.blends.parts.t(), self.blends.shares.t(), strict=True):
            weights += shares[rows].unsqueeze(1) * self._weigh_parts(x, logits, parts[rows])
        return weights

    def _weigh_parts(self, x: torch.Tensor, logits: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
        """Weights [T, C] where each token has one part, `parts` [T]."""
        weights = []
        if self.k_max:
            scores = logits if self.absolute is None else torch.where(self.absolute, logits.abs(), logits)
            weights.append(top_k_weights(scores, self.chosen[parts], self.top_k[parts], self.k_max))
        if self.groups is not None:
            weights.append(_grouped(self.groups, x, logits, parts))
        if self.constant is not None:
            weights.append(self.constant[parts])
        return sum(weights[1:], start=weights[0]) if weights else torch.zeros_like(logits)


def _grouped(groups: StagedGroups, x: torch.Tensor, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    weights = grouped_weights(
        x @ groups.weight.t() + groups.bias,
        logits,
        group_allowed=groups.allowed[rows],
        allowed=groups.columns[rows],
        member=groups.member,
        epsilon=groups.epsilon[rows],
    )
    return groups.share[rows].unsqueeze(1) * weights


def stage_router(layer: int, mixtures: Sequence[Mixture], device: torch.device) -> StagedRouter:
    """Pack the routers of one layer; row i + 1 is `mixtures[i]`, which may have none here."""
    parts = [_parts(layer, mixture) for mixture in mixtures]
    columns: list[StagedColumn] = []
    rows: list[StagedRow] = []
    weights: list[torch.Tensor] = []
    num_groups = 0
    placed = ((row, part) for row, own in enumerate(parts, start=1) for part in own)
    for number, (row, part) in enumerate(placed, start=1):
        if part is None:
            continue
        router = part.router
        first, begin = num_groups, len(columns)
        labels = router.labels or ("",) * len(router.experts)
        columns += [StagedColumn(row, digest, label) for digest, label in zip(router.experts, labels, strict=True)]
        num_groups += len(router.groups.names) if router.groups else 0
        end = len(columns)
        rows.append(StagedRow(row, number, part.kind, part.top_k, begin, end, first, num_groups, router))
        weights.append(router.weight / router.groups.tau_expert if router.groups else router.weight)
    count, width = 1 + sum(map(len, parts)), len(columns)
    bias, constant = torch.zeros(width), torch.zeros(count, width)
    chosen, absolute = torch.zeros(count, width, dtype=torch.bool), torch.zeros(width, dtype=torch.bool)
    top_k = torch.ones(count, dtype=torch.int64)
    for staged in rows:
        place, router = slice(staged.begin, staged.end), staged.router
        if router.bias is not None:
            bias[place] = router.bias / (router.groups.tau_expert if router.groups else 1)
        if router.constant is not None:
            constant[staged.part, place] = router.constant
        if staged.kind in ("top_k", "arrow"):
            chosen[staged.part, place] = True
            absolute[place] = staged.kind == "arrow"
            top_k[staged.part] = staged.top_k
    return StagedRouter(
        columns=tuple(columns),
        rows=tuple(rows),
        weight=torch.cat(weights).to(device),
        bias=bias.to(device) if bias.any() else None,
        chosen=chosen.to(device),
        top_k=top_k.to(device),
        k_max=int(top_k.max()) if chosen.any() else 0,
        absolute=absolute.to(device) if absolute.any() else None,
        constant=constant.to(device) if constant.any() else None,
        groups=_stage_groups(rows, count, width, num_groups, device) if num_groups else None,
        blends=_stage_parts(parts, device) if count > 1 + len(mixtures) else None,
    )


def _parts(layer: int, mixture: Mixture) -> tuple[RouterPart | None, ...]:
    """A blend's parts, or the one of another mixture; None holds the place of a mixture without a router here."""
    router = mixture.routers.get(layer)
    if router is None:
        return (None,)
    return router.parts or (RouterPart(1.0, mixture.kind, mixture.top_k, router),)


def _stage_parts(parts: Sequence[Sequence[RouterPart | None]], device: torch.device) -> StagedParts:
    shape = (1 + len(parts), max(map(len, parts)))
    numbers, shares = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    number = 0
    for row, own in enumerate(parts, start=1):
        for place, part in enumerate(own):
            number += 1
            numbers[row, place], shares[row, place] = number, part.share if part else 0.0
    return StagedParts(numbers.to(device), shares.to(device))


def _stage_groups(
    rows: Sequence[StagedRow], count: int, width: int, num_groups: int, device: torch.device
) -> StagedGroups:
    parts: list[LayerGroups] = []
    allowed = torch.zeros(count, num_groups, dtype=torch.bool)
    columns = torch.zeros(count, width, dtype=torch.bool)
    member = torch.zeros(width, dtype=torch.int64)
    share, epsilon = torch.zeros(count), torch.zeros(count)
    for staged in rows:
        groups = staged.router.groups
        if groups is None:
            continue
        parts.append(groups)
        allowed[staged.part, staged.first_group : staged.last_group] = groups.allowed
        own = groups.member.clamp(min=0)
        columns[staged.part, staged.begin : staged.end] = (groups.member >= 0) & groups.allowed[own]
        member[staged.begin : staged.end] = own + staged.first_group
        share[staged.part], epsilon[staged.part] = groups.share, groups.epsilon
    return StagedGroups(
        weight=torch.cat([groups.weight / groups.tau_group for groups in parts]).to(device),
        bias=torch.cat([groups.bias / groups.tau_group for groups in parts]).to(device),
        allowed=allowed.to(device),
        columns=columns.to(device),
        member=member.to(device),
        share=share.to(device),
        epsilon=epsilon.to(device),
    )
