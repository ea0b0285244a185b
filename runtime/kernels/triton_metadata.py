"""What the grouped kernels need to know about a routing: which pairs belong together, as small integer tables.

It knows nothing of ranks, weights' values or kernels' source; one set of tables serves gate, up and down, whose ranks
may differ.
Read first: a pair `p = t * K + k` is token t with its k-th expert. All shapes follow from T, K and E alone, unused
places hold -1, and nothing waits for the device, so that a step is never stalled to find out how tokens were routed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

DECODE_TOKENS = 16
"""Up to this many tokens the decode kernels run, which need no tables."""

BLOCK_PAIRS = 32
"""Pairs of one expert per tile of the grouped shrink."""

BLOCK_TOKENS = 32
"""Tokens per tile of the grouped expand."""


@dataclass(frozen=True)
class GroupedTables:
    """Tables of the grouped kernels, all int32.

    Args:
        order: [P], pairs by expert, then by token; pairs without an expert last.
        tiles: [N, 3], expert, first and end position in `order`; N = P // BLOCK_PAIRS + min(E, P) is an upper bound.
        token_order: [T], tokens with the same set of experts beside each other.
        tile_experts: [ceil(T / BLOCK_TOKENS), min(E, BLOCK_TOKENS * K)], experts of each token tile, ascending.
        num_tile_experts: [ceil(T / BLOCK_TOKENS)], how many there are.
    """

    order: torch.Tensor
    tiles: torch.Tensor
    token_order: torch.Tensor
    tile_experts: torch.Tensor
    num_tile_experts: torch.Tensor


@dataclass(frozen=True)
class MixtureMetadata:
    """The routing of T tokens to K of E experts each.

    Args:
        ids: [T, K] int32, -1 where nothing is added.
        weights: [T, K] float32.
        num_experts: E.
        grouped: None where there are so few tokens that the decode kernels run.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    num_experts: int
    grouped: GroupedTables | None


def build_metadata(ids: torch.Tensor, weights: torch.Tensor, num_experts: int) -> MixtureMetadata:
    """Tables for `y[t] += sum_k weights[t, k] * scale * B[ids[t, k]] A[ids[t, k]] x[t]`.

    Args:
        ids: [T, K] integers below E; negative, or any with weight 0, adds nothing. A repeated expert adds twice.
        weights: [T, K].
        num_experts: E >= 1.
    """
    used = (weights != 0) & (ids >= 0)
    kept = torch.where(used, ids, -1).to(torch.int32)
    grouped = _group(kept.long(), num_experts) if ids.shape[0] > DECODE_TOKENS else None
    return MixtureMetadata(kept, torch.where(used, weights.float(), 0.0), num_experts, grouped)


def pairs_of_columns(
    weights: torch.Tensor, column_experts: torch.Tensor, k_max: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights [T, K] of weights over router columns [T, C], K = min(k_max, C), largest weight first.

    Args:
        weights: [T, C], at most `k_max` of a row above 0.
        column_experts: [C] int64, the expert that a column scores.
        k_max: experts per token, at most.
    """
    values, columns = weights.topk(min(k_max, weights.shape[1]), dim=1)
    return torch.where(values > 0, column_experts[columns], -1), values


def _group(ids: torch.Tensor, num_experts: int) -> GroupedTables:
    num_tokens, num_columns = ids.shape
    keys = torch.where(ids >= 0, ids, num_experts)  # what adds nothing sorts last
    sorted_keys, order = keys.flatten().sort(stable=True)
    experts = torch.arange(num_experts + 1, device=ids.device)
    starts = torch.searchsorted(sorted_keys, experts)  # [E + 1]
    token_keys = torch.zeros(num_tokens, dtype=torch.int64, device=ids.device)
    for column in keys.sort(dim=1).values.unbind(1):
        token_keys = token_keys * (num_experts + 1) + column  # may wrap: it only decides who stands beside whom
    token_order = token_keys.argsort(stable=True)
    num_tiles = -(-num_tokens // BLOCK_TOKENS)
    tile = torch.arange(num_tokens, device=ids.device) // BLOCK_TOKENS
    present = torch.zeros(num_tiles, num_experts + 1, dtype=torch.bool, device=ids.device)
    present.index_put_((tile.unsqueeze(1), keys[token_order]), present.new_ones(()))  # no scalar from the host
    present = present[:, :num_experts]
    listed = torch.where(present, experts[:num_experts], num_experts).sort(dim=1).values
    listed = listed[:, : min(num_experts, BLOCK_TOKENS * num_columns)]
    return GroupedTables(
        order=order.int(),
        tiles=_tiles(starts, order.numel(), num_experts),
        token_order=token_order.int(),
        tile_experts=torch.where(listed < num_experts, listed, -1).int().contiguous(),
        num_tile_experts=present.sum(1).int(),
    )


def _tiles(starts: torch.Tensor, num_pairs: int, num_experts: int) -> torch.Tensor:
    per_expert = (starts.diff() + BLOCK_PAIRS - 1) // BLOCK_PAIRS  # [E]
    ends = per_expert.cumsum(0)
    tile = torch.arange(num_pairs // BLOCK_PAIRS + min(num_experts, num_pairs), device=starts.device)
    owner = torch.searchsorted(ends, tile, right=True)  # E behind the last tile
    expert = owner.clamp(max=num_experts - 1)
    begin = starts[expert] + (tile - ends[expert] + per_expert[expert]) * BLOCK_PAIRS
    table = torch.stack((expert, begin, starts[expert + 1]), dim=1)
    return torch.where((owner < num_experts).unsqueeze(1), table, -1).int()
