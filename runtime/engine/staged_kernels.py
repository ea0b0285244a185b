"""A staged layer as the GPU's kernels read it: which expert every router column scores, and where its rows lie.

It knows nothing of devices or launching; `runtime.kernels.triton_mixture` says what is launched.
Read first: `K`, the experts per token, follows from the routers and not from a step's tokens: nothing waits for the
device. A grouped router may weigh all of its columns, one that keeps the K largest no more than these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runtime.engine.staged_router import StagedRouter, StagedRow
from runtime.kernels.mixture import PackedUpdate
from runtime.kernels.triton_metadata import MixtureMetadata, build_metadata, pairs_of_columns
from runtime.kernels.triton_mixture import ExpertRows, Launcher, add_mixture_triton, expert_rows

_ALIGNMENT = 16  # bytes, and elements of a stride: what compiled kernels take for granted


class KernelColumns:
    """The columns of a layer's router over its packed experts.

    Args:
        router: of all mixtures.
        experts: digests, in the order of packing.
        device: where the tables go.
    """

    def __init__(self, router: StagedRouter, experts: Sequence[str], device: torch.device) -> None:
        order = {digest: place for place, digest in enumerate(experts)}
        places = [order[column.expert] for column in router.columns]
        self._experts = torch.tensor(places, dtype=torch.int64).to(device)
        self._num_experts = len(order)
        self.k_max = most_experts(router)

    def metadata(self, weights: torch.Tensor) -> MixtureMetadata:
        """Of the weights [T, C] that the router gave."""
        ids, values = pairs_of_columns(weights, self._experts, self.k_max)
        return build_metadata(ids, values, self._num_experts)


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


class KernelUpdate:
    """One linear's update by all packed experts.

    Args:
        a: [S, D].
        b: [S, H], the scale in it.
        owners: digest of the expert of every row.
        experts: digests, in the order of packing.
    """

    def __init__(self, a: torch.Tensor, b: torch.Tensor, owners: Sequence[str], experts: Sequence[str]) -> None:
        ranks = [owners.count(digest) for digest in experts]
        if a.data_ptr() % _ALIGNMENT:
            a = a.clone()
        owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks)).to(a.device)
        self._rows: ExpertRows = expert_rows(PackedUpdate(a.contiguous(), b, owner), ranks)

    def add(self, y: torch.Tensor, x: torch.Tensor, metadata: MixtureMetadata, launch: Launcher) -> None:
        """Add to `y` [T, H], in place; its rows may be apart."""
        if y.data_ptr() % _ALIGNMENT or y.stride(0) % _ALIGNMENT:
            beside = y.contiguous()
            add_mixture_triton(beside, x, self._rows, metadata, launch)
            if beside.data_ptr() != y.data_ptr():
                y.copy_(beside)
            return
        add_mixture_triton(y, x, self._rows, metadata, launch)
