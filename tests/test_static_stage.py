"""Seats: packed layers of fixed shapes, which compute what the packs compute that fill them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from repertoires import Workshop

from runtime.engine.stage import LayerPacks, StagedLayer
from runtime.engine.static_room import room_for, rounded
from runtime.engine.static_stage import StaticPacks
from runtime.kernels.triton_interpreter import interpret
from runtime.kernels.triton_mixture import rank_bucket
from runtime.model.attach import fresh_expert
from runtime.model.blend import blended
from runtime.model.expert import Expert
from runtime.model.generation import base_ref, open_generation
from runtime.model.manifest import TARGETS, Target
from runtime.model.mixture import Mixture

LAYER = 3
CPU = torch.device("cpu")
SETS = [
    ("red",),
    ("red", "green", "blue", "both", "all"),
    ("green",),
    ("blue", "red"),
    ("both",),
]
MakeMixtures = Callable[[Sequence[str]], list[tuple[Mixture, Callable[[str, int], Expert]]]]


@pytest.fixture
def made(workshop: Workshop) -> MakeMixtures:
    """Mixtures by name: top-1, Arrow, grouped with a general share, and two blends; ranks from 1 to 20."""
    workshop.publish("red", "aaaa", top_k=1)
    workshop.publish("green", "12 34", kind="arrow")
    workshop.publish("blue", "? !", grouping={"groups": ("one", "two"), "scope": "token", "share": 0.6})
    generation, ref = open_generation(workshop.repertoire), base_ref(workshop.base.info)
    mixtures = {name: generation.mixture(name) for name in ("red", "green", "blue")}
    mixtures["both"] = blended([(0.3, mixtures["red"]), (0.7, mixtures["green"])])
    mixtures["all"] = blended([(0.2, mixtures["red"]), (0.3, mixtures["green"]), (0.5, mixtures["blue"])])
    digests = [entry.digest for entry in generation.manifest.experts]

    def fetch(digest: str, layer: int) -> Expert:
        number = digests.index(digest)
        generator = torch.Generator().manual_seed(number)
        targets: tuple[Target, ...] = (TARGETS, ("gate", "down"), ("q", "up"))[number]
        expert = fresh_expert(layer, rank=(1, 20, 9)[number], alpha=4.0, base=ref, generator=generator, targets=targets)
        for update in expert.updates.values():
            update.b.copy_(torch.randn(update.b.shape, generator=generator))
        return expert

    return lambda names: [(mixtures[name], fetch) for name in names]


def packs() -> LayerPacks:
    return LayerPacks(dtype=torch.float32, device=CPU)


def tensors_of(layer: StagedLayer) -> dict[str, torch.Tensor]:
    router, found = layer.router, {}
    for prefix, part in (("", router), ("groups.", router.groups), ("blends.", router.blends)):
        for name, value in vars(part).items() if part else ():
            if isinstance(value, torch.Tensor):
                found[prefix + name] = value
    for update in layer.updates.values():
        for target, (begin, end, b) in update.b.items():
            found |= {f"{target}.a": update.a[begin:end], f"{target}.b": b, f"{target}.w": update.spread[:, begin:end]}
            found[f"{target}.rows"] = layer.kernel_updates[target].rows.rows
    return {**found, "experts": layer.kernel_columns.experts}


def outputs(layer: StagedLayer, x: dict[int, torch.Tensor], rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weights [T, C], and what each linear gets by torch's products and by the kernels."""
    weights = layer.router.weigh(x[64], rows)
    metadata = layer.kernel_columns.metadata(weights)
    found = {"weights": weights}
    for update in layer.updates.values():
        entering = x[update.a.shape[1]]
        for target, (_, _, b) in update.b.items():
            plain, launched = torch.zeros(len(rows), b.shape[1]), torch.zeros(len(rows), b.shape[1])
            update.expand(target, plain, update.shrink(entering, weights))
            layer.kernel_updates[target].add(launched, entering, metadata, interpret)
            found |= {target: plain, f"{target} launched": launched}
    return found


@pytest.mark.parametrize("num_tokens", [6, 18])
def test_a_seat_computes_what_the_pack_computes_whatever_was_in_it(made: MakeMixtures, num_tokens: int) -> None:
    static = StaticPacks(packs(), num_rows=18)
    torch.manual_seed(0)
    x = {width: torch.randn(num_tokens, width) for width in (64, 128)}
    for names in SETS:
        mixtures = made(names)
        plain, seated = packs().pack(LAYER, mixtures), static.pack(LAYER, mixtures)
        rows = torch.arange(num_tokens) % (1 + len(names))
        expected, got = outputs(plain, x, rows), outputs(seated, x, rows)
        columns = len(plain.router.columns)
        torch.testing.assert_close(got["weights"][:, :columns], expected.pop("weights"))
        assert not got.pop("weights")[:, columns:].any()
        for name, value in got.items():
            torch.testing.assert_close(value, expected.get(name, torch.zeros_like(value)), rtol=1e-4, atol=1e-3)
        assert expected.keys() <= got.keys()


def test_nothing_of_an_earlier_pack_is_left(made: MakeMixtures) -> None:
    used, largest = StaticPacks(packs(), num_rows=18), made(SETS[1])
    for names, others in itertools.permutations([SETS[0], *SETS[2:]], 2):
        used.pack(LAYER, made(names))
        used.pack(LAYER, largest)
        fresh = StaticPacks(packs(), num_rows=18)
        for value in tensors_of(fresh.pack(LAYER, largest)).values():  # as much room, and nothing in it
            value.zero_()
        expected, got = tensors_of(fresh.pack(LAYER, made(others))), tensors_of(used.pack(LAYER, made(others)))
        assert expected.keys() == got.keys()
        for name, value in got.items():
            assert torch.equal(value, expected[name]), name


def test_memory_stays_where_it_is_until_more_room_is_needed(made: MakeMixtures) -> None:
    static = StaticPacks(packs(), num_rows=18)
    first = static.pack(LAYER, made(("red",)))
    assert static.version(LAYER) == 1
    grown = static.pack(LAYER, made(SETS[1]))
    assert grown is not first
    assert static.version(LAYER) == 2
    places = {name: value.data_ptr() for name, value in tensors_of(grown).items()}
    for names in SETS:
        assert {name: value.data_ptr() for name, value in tensors_of(static.pack(LAYER, made(names))).items()} == places
    assert static.version(LAYER) == 2


def test_every_part_of_a_seat_begins_where_compiled_kernels_take_it(made: MakeMixtures) -> None:
    static = StaticPacks(packs(), num_rows=18)
    for update in static.pack(LAYER, made(SETS[1])).updates.values():
        for begin, end, b in update.b.values():
            assert begin % 16 == end % 16 == update.a[begin:end].data_ptr() % 16 == b.data_ptr() % 16 == 0


def test_what_is_held_is_not_copied_again(made: MakeMixtures) -> None:
    inner = packs()
    static, mixtures = StaticPacks(inner, num_rows=18), made(("red",))
    seated = static.pack(LAYER, mixtures)
    seated.router.weight.fill_(7)  # as nothing else would
    again = static.pack(LAYER, mixtures)
    assert again is seated
    assert bool((again.router.weight == 7).all())


def test_there_is_room_for_the_largest_rank(made: MakeMixtures) -> None:
    assert [room_for(packs().pack(LAYER, made(names))).largest for names in (("red",), ("green",))] == [8, 32]


@pytest.mark.parametrize("largest", [8, 16, 32, 64, 128, 512])
def test_the_ranks_of_a_room_meet_every_bucket_up_to_the_largest(made: MakeMixtures, largest: int) -> None:
    room = replace(room_for(packs().pack(LAYER, made(("red",)))), largest=largest)
    ranks = room.spanning_ranks()
    assert len(ranks) == room.experts
    assert max(ranks) == largest
    for rank in range(1, room.largest + 1):
        own = [each for each in ranks if rank_bucket(each) == rank_bucket(rank)]
        assert min(own) <= rank <= max(own)


def test_room_is_rounded_up_to_powers_of_two() -> None:
    assert [rounded(count, least=1) for count in (0, 1, 2, 3, 5, 8, 9)] == [1, 1, 2, 4, 8, 8, 16]
    assert rounded(3) == rounded(8) == 8
