"""Slabs and the device tier, on CPU tensors: buckets, budgets, eviction, and what is copied."""

from __future__ import annotations

import random

import pytest
import torch

from runtime.errors import BudgetError
from runtime.memory.keys import UnitKey
from runtime.memory.slab_tier import SlabTier, make_tier
from runtime.memory.slabs import Place, Slabs, bucket
from runtime.memory.tier import HostTier
from runtime.memory.wanted import Wanted
from runtime.model.expert import Expert, LowRank

CPU = torch.device("cpu")


def make_slabs(budget: int, slab: int = 1024) -> Slabs:
    return Slabs(budget_bytes=budget, slab_bytes=slab, dtype=torch.float32, device=CPU)


def wanted(name: str, *rows: tuple[int, int]) -> Wanted:
    return Wanted(key=(name, 0), task=name, num_bytes=1, rows=rows, read=lambda: expert(4, 2))


def expert(rank: int, width: int) -> Expert:
    update = LowRank(torch.randn(rank, width), torch.randn(width, rank))
    return Expert(layer=0, scale=2.0, updates={"up": update, "down": update})


def test_a_rank_is_rounded_up_by_at_most_a_half() -> None:
    assert [bucket(rank) for rank in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 64, 65)] == [
        *(1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 16, 64, 96),
    ]
    assert all(rank <= bucket(rank) < 1.5 * rank + 1 for rank in range(1, 600))


def test_a_small_expert_takes_the_room_of_its_own_rank_whatever_the_largest_has() -> None:
    slabs = make_slabs(10_000)
    assert slabs.allocate(64, 16) is not None
    before = slabs.used_bytes
    assert slabs.allocate(2, 16) is not None
    assert slabs.used_bytes - before == 2 * 16 * 4


def test_views_of_places_do_not_overlap_and_an_empty_slab_gives_its_bytes_to_other_ranks() -> None:
    slabs = make_slabs(4 * 4 * 8 * 4, slab=4 * 4 * 8 * 4)
    places = [slabs.allocate(4, 8, more=3 - i) for i in range(4)]
    assert all(place is not None for place in places)
    for i, place in enumerate(places):
        assert place is not None
        slabs.view(place, 3).fill_(float(i))
    for i, place in enumerate(places):
        assert place is not None
        assert slabs.view(place, 3).unique().tolist() == [float(i)]
    assert slabs.allocate(2, 8) is None, "the budget is one slab"
    for place in places:
        assert place is not None
        slabs.free(place)
    assert slabs.used_bytes == 0
    assert slabs.allocate(2, 8) is not None
    slabs.check_integrity()


@pytest.mark.parametrize("seed", range(5))
def test_random_places_keep_the_sums(seed: int) -> None:
    rng, slabs = random.Random(seed), make_slabs(20_000)
    held: list[Place] = []
    for _ in range(500):
        if held and rng.random() < 0.5:
            slabs.free(held.pop(rng.randrange(len(held))))
        else:
            place = slabs.allocate(rng.randint(1, 20), rng.choice([8, 16]), more=rng.randint(0, 3))
            held += [place] if place is not None else []
        slabs.check_integrity()
    for place in held:
        slabs.free(place)
    assert slabs.used_bytes == 0


def make_slab_tier(matrices: int) -> SlabTier:
    return SlabTier(budget_bytes=matrices * 4 * 2 * 4, dtype=torch.float32, device=CPU, slab_bytes=64)


def test_what_is_put_is_equal_contiguous_and_in_the_engines_dtype() -> None:
    tier = SlabTier(budget_bytes=10_000, dtype=torch.bfloat16, device=CPU)
    assert tier.hold([wanted("a", (4, 2), (4, 2), (4, 2), (4, 2))], [])
    value = expert(4, 2)
    placed = tier.put(("a", 0), value)
    assert isinstance(placed, Expert)
    assert placed.scale == 2.0
    for target, update in value.updates.items():
        got = placed.updates[target]
        torch.testing.assert_close(got.a, update.a.bfloat16(), rtol=0, atol=0)
        torch.testing.assert_close(got.b, update.b.bfloat16(), rtol=0, atol=0)
        assert got.a.is_contiguous()
        assert got.b.t().is_contiguous(), "kernels read B by rank rows"


def test_a_set_gets_all_of_its_room_or_none_and_evicts_only_what_nobody_holds() -> None:
    tier, gone = make_slab_tier(4), list[UnitKey]()
    two = ((4, 2), (4, 2))
    assert tier.hold([wanted("a", *two), wanted("b", *two)], gone)
    assert not tier.hold([wanted("c", *two)], gone)
    assert gone == []
    tier.let_go(("a", 0))
    assert not tier.hold([wanted("c", *two), wanted("d", *two)], gone), "b is held"
    assert gone == [("a", 0)]
    assert tier.hold([wanted("c", *two)], gone)
    tier.check_integrity()
    with pytest.raises(BudgetError, match="exceed the device memory of 128 bytes"):
        tier.check_fits([wanted("e", *two, *two, (1, 1))])


def test_the_tier_of_a_cpu_is_host_memory_and_copies_nothing() -> None:
    tier = make_tier(CPU, torch.float32, 1)
    value = expert(4, 2)
    assert isinstance(tier, HostTier)
    assert tier.put(("a", 0), value) is value
