"""The tables of the grouped kernels: every pair lies in exactly one tile, of its own expert, whatever the routing."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.kernels.triton_metadata import (
    BLOCK_PAIRS,
    BLOCK_TOKENS,
    DECODE_TOKENS,
    GroupedTables,
    build_metadata,
    pairs_of_columns,
)


def grouped(ids: torch.Tensor, num_experts: int) -> GroupedTables:
    tables = build_metadata(ids, torch.ones(ids.shape), num_experts).grouped
    assert tables is not None
    return tables


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    num_experts = draw(st.integers(1, 9))
    num_tokens, num_columns = draw(st.integers(DECODE_TOKENS + 1, 100)), draw(st.integers(1, 4))
    popular = draw(st.integers(1, num_experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return torch.randint(-1, popular, (num_tokens, num_columns), generator=generator), num_experts


@settings(max_examples=60, deadline=None)
@given(routings())
def test_every_pair_lies_in_exactly_one_tile_of_its_own_expert(routing: tuple[torch.Tensor, int]) -> None:
    ids, num_experts = routing
    tables, flat = grouped(ids, num_experts), ids.flatten()
    assert tables.tiles.shape == (flat.numel() // BLOCK_PAIRS + min(num_experts, flat.numel()), 3)
    seen: list[int] = []
    for expert, begin, end in tables.tiles.tolist():
        if expert < 0:
            continue
        pairs = tables.order[begin : min(begin + BLOCK_PAIRS, end)].tolist()
        assert pairs
        assert (flat[pairs] == expert).all()
        seen += pairs
    assert sorted(seen) == (flat >= 0).nonzero().flatten().tolist()


@settings(max_examples=60, deadline=None)
@given(routings())
def test_a_token_tile_lists_the_experts_of_its_tokens_once_and_ascending(routing: tuple[torch.Tensor, int]) -> None:
    ids, num_experts = routing
    tables = grouped(ids, num_experts)
    assert sorted(tables.token_order.tolist()) == list(range(len(ids)))
    assert len(tables.tile_experts) == len(tables.num_tile_experts) == -(-len(ids) // BLOCK_TOKENS)
    for tile, (row, count) in enumerate(zip(tables.tile_experts.tolist(), tables.num_tile_experts, strict=True)):
        tokens = tables.token_order[tile * BLOCK_TOKENS : (tile + 1) * BLOCK_TOKENS]
        wanted = sorted(set(ids[tokens].flatten().tolist()) - {-1})
        assert row == wanted + [-1] * (len(row) - len(wanted))
        assert count == len(wanted)


def test_tokens_with_the_same_experts_stand_beside_each_other_in_whatever_order_they_chose_them() -> None:
    ids = torch.tensor([[0, 1], [2, 3], [1, 0], [3, 2]] * 16)
    tables = grouped(ids, 4)
    assert tables.tile_experts[:, :3].tolist() == [[0, 1, -1], [2, 3, -1]]


def test_a_weight_of_zero_or_a_negative_id_is_no_pair() -> None:
    metadata = build_metadata(torch.tensor([[0, 1], [-1, 1]]), torch.tensor([[0.0, 0.5], [0.5, 1.0]]), 2)
    assert metadata.ids.tolist() == [[-1, 1], [-1, 1]]
    assert metadata.weights.tolist() == [[0.0, 0.5], [0.0, 1.0]]


def test_few_tokens_need_no_tables() -> None:
    for num_tokens, has_tables in ((DECODE_TOKENS, False), (DECODE_TOKENS + 1, True)):
        metadata = build_metadata(torch.zeros(num_tokens, 2, dtype=torch.int64), torch.ones(num_tokens, 2), 1)
        assert (metadata.grouped is not None) == has_tables


def test_router_columns_become_pairs_of_the_experts_they_score() -> None:
    weights = torch.tensor([[0.0, 0.3, 0.7, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    ids, values = pairs_of_columns(weights, torch.tensor([5, 6, 5, 7]), 2)
    assert ids.tolist() == [[5, 6], [5, -1], [-1, -1]]
    torch.testing.assert_close(values, torch.tensor([[0.7, 0.3], [1.0, 0.0], [0.0, 0.0]]))
