"""A staged layer as the GPU's kernels read it: which expert every router column scores, and where its rows lie.

It knows nothing of devices or launching; `runtime.kernels.triton_mixture` says what is launched.
Read first: `K`, the experts per token, follows from the routers and not from a step's tokens: nothing waits for the
device. A grouped router may weigh all of its columns, one that keeps the K largest no more than these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.engine.staged_router import StagedRouter, StagedRow
from runtime.kernels.mixture import PackedUpdate
from runtime.kernels.triton_metadata import MixtureMetadata, build_metadata, pairs_of_columns
from runtime.kernels.triton_mixture import ExpertRows, Launcher, add_mixture_triton, expert_rows

_ALIGNMENT = 16  # bytes, and elements of a stride: what compiled kernels take for granted


@dataclass(frozen=True)
class KernelColumns:
    """The columns of a layer's router over its packed experts.

    Args:
        experts: [C] int64, the place of the expert that a column scores.
        num_experts: that are packed.
        k_max: columns of a token that have a weight, at most.
    """

    experts: torch.Tensor
    num_experts: int
    k_max: int

    def metadata(self, weights: torch.Tensor) -> MixtureMetadata:
        """Of the weights [T, C] that the router gave."""
        ids, values = pairs_of_columns(weights, self.experts, self.k_max)
        return build_metadata(ids, values, self.num_experts)


def kernel_columns(router: StagedRouter, experts: Sequence[str], device: torch.device) -> KernelColumns:
    """The columns of all mixtures' routers over `experts`, digests in the order of packing, as a table on `device`."""
    order = {digest: place for place, digest in enumerate(experts)}
    places = torch.tensor([order[column.expert] for column in router.columns], dtype=torch.int64)
    return KernelColumns(places.to(device), len(order), most_experts(router))


def most_experts(router: StagedRouter) -> int:
    """How many columns of a token can have a weight at most."""
    counts: dict[int, int] = {}
    for row in router.rows:
        counts[row.row] = counts.get(row.row, 0) + _most(row)
    return max(1, *counts.values()) if counts else 1


def _most(row: StagedRow) -> int:
    columns = row.end - row.begin
    if row.router.groups is not None or row.kind not in ("top_k", "arrow"):
        return columns
    constant = 0 if row.router.constant is None else int((row.router.constant != 0).sum())
    return min(columns, row.top_k + constant)


@dataclass(frozen=True)
class KernelUpdate:
    """One linear's update by all packed experts, `rows`."""

    rows: ExpertRows

    def add(self, y: torch.Tensor, x: torch.Tensor, metadata: MixtureMetadata, launch: Launcher) -> None:
        """Add to `y` [T, H], in place; its rows may be apart."""
        if y.data_ptr() % _ALIGNMENT or y.stride(0) % _ALIGNMENT:
            beside = y.contiguous()
            add_mixture_triton(beside, x, self.rows, metadata, launch)
            if beside.data_ptr() != y.data_ptr():
                y.copy_(beside)
            return
        add_mixture_triton(y, x, self.rows, metadata, launch)


def kernel_update(a: torch.Tensor, b: torch.Tensor, owners: Sequence[str], experts: Sequence[str]) -> KernelUpdate:
    """One linear's update as the kernels read it, on the same memory where that is aligned.

    Args:
        a: [S, D].
        b: [S, H], the scale in it.
        owners: digest of the expert of every row.
        experts: digests, in the order of packing.
    """
    ranks = [owners.count(digest) for digest in experts]
    if a.data_ptr() % _ALIGNMENT:
        a = a.clone()
    owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks)).to(a.device)
    return KernelUpdate(expert_rows(PackedUpdate(a.contiguous(), b, owner), ranks))
