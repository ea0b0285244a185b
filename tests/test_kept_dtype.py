"""In which dtype experts stay in memory: what is counted, what is kept, and what does not fit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from repertoires import FIRST_LAYER, Workshop

from runtime.batch.plan import unit_sizes
from runtime.errors import NonFiniteError
from runtime.memory.kept_dtype import in_dtype, kept_bytes, kept_dtype
from runtime.memory.visible import VisibleSets
from runtime.memory.wanted import Wanted
from runtime.model.expert import Expert, LowRank, pack_expert_set
from runtime.model.generation import base_ref, open_generation
from runtime.model.manifest import ExpertSet
from runtime.model.side_by_side import fresh_memory


def wanted_of(workshop: Workshop, dtype: torch.dtype | None) -> list[Wanted]:
    """The experts of red, as an engine wants them that keeps `dtype`."""
    visible = VisibleSets(workshop.repertoire, max_rank=64, dtype=dtype)
    return [one for one in visible.of(open_generation(workshop.repertoire), "red").wanted if one.rows]


def stored_as(workshop: Workshop, dtype: str) -> ExpertSet:
    """An expert set of another dtype, of which only its record matters here."""
    ref = base_ref(workshop.base.info)
    update = LowRank(torch.ones(2, ref.width), torch.ones(ref.ffn_width, 2))
    return pack_expert_set({3: Expert(3, 1.0, {"gate": update})}, task="red", dtype=dtype, base=ref)[1]


def test_experts_stored_in_float32_are_kept_in_the_bfloat16_that_an_engine_computes_with(three_tasks: Workshop) -> None:
    for whole, half in zip(wanted_of(three_tasks, None), wanted_of(three_tasks, torch.bfloat16), strict=True):
        stored, kept = whole.read(), half.read()
        assert isinstance(stored, Expert)
        assert isinstance(kept, Expert)
        assert kept.num_bytes == half.num_bytes == whole.num_bytes // 2
        assert (kept.layer, kept.scale, list(kept.updates)) == (stored.layer, stored.scale, list(stored.updates))
        for target, update in stored.updates.items():
            assert torch.equal(kept.updates[target].a, update.a.bfloat16())
            assert torch.equal(kept.updates[target].b, update.b.bfloat16())
            assert kept.updates[target].b.t().is_contiguous()
    assert whole.key[1] > FIRST_LAYER, "there were experts to look at"


def test_a_kept_expert_lies_in_one_piece_of_the_memory_that_it_is_given() -> None:
    expert = Expert(3, 0.5, {"gate": LowRank(torch.randn(2, 4), torch.randn(6, 2))})
    given: list[memoryview] = []

    def allocate(sizes: Sequence[int]) -> list[memoryview]:
        given.extend(fresh_memory(sizes))
        return given

    kept = in_dtype(expert, torch.bfloat16, allocate=allocate)
    assert [len(piece) for piece in given] == [kept.num_bytes] == [2 * (2 * 4 + 6 * 2)]
    whole = torch.frombuffer(given[0], dtype=torch.bfloat16)
    update = kept.updates["gate"]
    assert torch.equal(whole, torch.cat((update.a.flatten(), update.b.t().flatten())))
    assert torch.equal(update.b, expert.updates["gate"].b.bfloat16())


@pytest.mark.parametrize(
    ("stored", "wanted", "kept"),
    [
        ("float32", torch.float32, torch.float32),
        ("float32", torch.bfloat16, torch.bfloat16),
        ("bfloat16", torch.float32, torch.bfloat16),
        ("bfloat16", torch.bfloat16, torch.bfloat16),
        ("float16", torch.float32, torch.float32),
        ("float16", torch.bfloat16, torch.bfloat16),
        ("float16", None, torch.float16),
    ],
)
def test_what_is_kept_follows_the_engine_but_nothing_grows_out_of_bfloat16(
    three_tasks: Workshop, stored: str, wanted: torch.dtype | None, kept: torch.dtype
) -> None:
    entry = stored_as(three_tasks, stored)
    ref = base_ref(three_tasks.base.info)
    assert kept_dtype(entry, wanted) == kept
    assert kept_bytes(entry, entry.units[0], wanted) == 2 * (ref.width + ref.ffn_width) * kept.itemsize


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_an_offline_plan_counts_every_unit_as_memory_does(three_tasks: Workshop, dtype: torch.dtype | None) -> None:
    generation = open_generation(three_tasks.repertoire)
    visible = VisibleSets(three_tasks.repertoire, max_rank=64, dtype=dtype)
    sizes = unit_sizes(generation, dtype=dtype)
    for task in ("red", "green", "blue"):
        assert sorted(sizes[task].values()) == sorted(one.num_bytes for one in visible.of(generation, task).wanted)


def test_a_weight_too_large_for_the_kept_dtype_is_refused() -> None:
    largest = torch.finfo(torch.float32).max
    assert torch.tensor(largest).isfinite()
    expert = Expert(3, 1.0, {"gate": LowRank(torch.full((1, 4), largest), torch.ones(4, 1))})
    with pytest.raises(NonFiniteError, match=r"layer 3 .* too large for torch\.bfloat16"):
        in_dtype(expert, torch.bfloat16)
