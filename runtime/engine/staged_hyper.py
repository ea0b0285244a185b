"""The hyper-adapters of all running mixtures in one layer: what they add to the FFN's output of a step's tokens.

It knows nothing of how adapters are made or kept (`runtime.model.hyper_sets`).
Read first: a mixture's adapter of a token depends on the experts that the token chose among the mixture's own columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.engine.staged_router import StagedRouter
from runtime.model.hyper_sets import Hyper
from runtime.model.mixture import Mixture


@dataclass(frozen=True)
class StagedHyper:
    """Of one layer: row of a mixture, first of its columns, the one behind its last, and its adapters."""

    layer: int
    rows: tuple[tuple[int, int, int, Hyper], ...]

    def add(self, hidden: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor) -> None:
        """`hidden += HyperExpert(x)`, in place.

        Args:
            hidden: [T, D], changed.
            x: [T, D], what the FFN read.
            weights: [T, C] of the router columns.
            rows: [T], each token's mixture.
        """
        for row, begin, end, hyper in self.rows:
            at = (rows == row).nonzero()[:, 0]
            if len(at):
                added = hyper.add(self.layer, x[at], weights[at, begin:end] > 0)
                hidden.index_add_(0, at, added.to(hidden.dtype))


def stage_hyper(layer: int, router: StagedRouter, mixtures: Sequence[Mixture]) -> StagedHyper | None:
    """The adapters of those of `mixtures` (rows 1, 2, ...) that have any in this layer; None where none has."""
    found = []
    for staged in router.rows:
        hyper = mixtures[staged.row - 1].hyper
        if hyper is not None and layer in hyper.sizes.experts:
            found.append((staged.row, staged.begin, staged.end, hyper))
    return StagedHyper(layer, tuple(found)) if found else None
