"""Hyper-adapters: what they compute, that they are made once per set, and that they are served as they were trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from engines import ask
from hyper_tasks import lively, with_hyper
from hypothesis import given, settings
from hypothesis import strategies as st
from repertoires import Workshop
from torch import nn

from runtime.engine.engine import Engine
from runtime.errors import ManifestError, TensorMismatchError
from runtime.model.attach import ExpertModule, MixtureFFN, attached, decoder_layers, fresh_expert, load_mixture
from runtime.model.base import BaseModel
from runtime.model.generation import base_ref, open_generation
from runtime.model.hyper import (
    EXPERT_WIDTH,
    HyperSizes,
    embedding_name,
    generate,
    hyper_shapes,
    place_name,
)
from runtime.model.hyper_module import HyperNetwork, TrainedHyper
from runtime.model.hyper_sets import Hyper, HyperKind, distinct_sets, full_table, num_parameters, stored_shapes
from runtime.model.manifest import parse_manifest

SIZES = HyperSizes(width=12, bottleneck=6, factor=3, experts={2: 4, 3: 2})


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def per_token(
    weights: Mapping[str, torch.Tensor], sizes: HyperSizes, layer: int, x: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """HyperMoE as the paper writes it: every token generates its own adapter."""

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return weights[f"{name}.weight"] @ value + weights[f"{name}.bias"]

    rows = []
    for token, selected in zip(x, chosen, strict=True):
        e = torch.zeros(EXPERT_WIDTH)
        for expert, is_selected in enumerate(selected.tolist()):
            if not is_selected:
                e = e + weights[embedding_name(layer)][expert]
        selection = linear("project", torch.relu(linear("select", e)))
        h = torch.relu(linear("join", torch.cat([selection, weights[place_name(layer)]])))
        down = linear("down_left", h).view(sizes.width, -1) @ linear("down_right", h).view(-1, sizes.bottleneck)
        up = linear("up_left", h).view(sizes.bottleneck, -1) @ linear("up_right", h).view(-1, sizes.width)
        rows.append(torch.relu(token @ down + linear("down_bias", h)) @ up + linear("up_bias", h))
    return torch.stack(rows)


# ---- what they compute


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 99))
def test_adapters_made_per_set_equal_adapters_made_per_token(num_tokens: int, top_k: int, seed: int) -> None:
    weights, generator = lively(SIZES), rng(seed)
    x = torch.randn(num_tokens, SIZES.width, generator=generator)
    scores = torch.rand(num_tokens, 4, generator=generator)
    chosen = torch.zeros(num_tokens, 4, dtype=torch.bool).scatter_(1, scores.topk(top_k).indices, value=True)
    found = Hyper("network", SIZES, weights, 1).add(2, x, chosen)
    torch.testing.assert_close(found, per_token(weights, SIZES, 2, x, chosen), atol=1e-5, rtol=1e-5)


def test_a_table_holds_for_every_single_expert_what_the_hypernetwork_makes() -> None:
    weights = lively(SIZES)
    table = full_table(weights, SIZES)
    assert {name: tuple(tensor.shape) for name, tensor in table.items()} == stored_shapes("table", SIZES)
    x = torch.randn(9, SIZES.width, generator=rng())
    chosen = torch.eye(4, dtype=torch.bool)[torch.arange(9) % 4]
    found = Hyper("table", SIZES, table, 1).add(2, x, chosen)
    torch.testing.assert_close(found, per_token(weights, SIZES, 2, x, chosen), atol=1e-5, rtol=1e-5)


def test_a_fresh_hypernetwork_adds_exactly_nothing_and_can_learn() -> None:
    network = HyperNetwork(SIZES, generator=rng())
    x, chosen = torch.randn(5, SIZES.width, generator=rng()), torch.eye(4, dtype=torch.bool)[[0, 1, 2, 3, 0]]
    y = TrainedHyper(network, 2)(x, chosen)
    assert torch.equal(y, torch.zeros(5, SIZES.width))
    (y * x).sum().backward()
    moved = {name for name, tensor in network.tensors().items() if tensor.grad is not None and tensor.grad.any()}
    assert {"up_right.weight", "up_bias.weight"} <= moved
    assert network.weights().keys() == hyper_shapes(SIZES).keys()


def test_every_expert_that_is_not_chosen_counts_and_every_layer_is_another() -> None:
    weights = lively(SIZES)
    sets = torch.tensor([[expert in pair for expert in range(4)] for pair in combinations(range(4), 2)])
    made = generate(weights, SIZES, 2, sets).down
    assert len({tuple(matrix.flatten().tolist()) for matrix in made}) == 6
    same = lively(replace(SIZES, experts={2: 4, 5: 4}))
    same[embedding_name(5)] = same[embedding_name(2)]
    sizes = replace(SIZES, experts={2: 4, 5: 4})
    assert not torch.equal(generate(same, sizes, 2, sets).up, generate(same, sizes, 5, sets).up)


def test_the_heads_grow_with_the_factor_and_not_with_width_times_bottleneck() -> None:
    wide = replace(SIZES, width=4096, bottleneck=64, factor=4)
    heads = 2 * EXPERT_WIDTH * 4096 * 64
    assert num_parameters(hyper_shapes(wide)) < heads / 10


def test_a_token_that_chose_nothing_and_a_layer_without_adapters_get_nothing() -> None:
    hyper = Hyper("network", SIZES, lively(SIZES), 1)
    x = torch.randn(2, SIZES.width, generator=rng())
    found = hyper.add(2, x, torch.tensor([[False] * 4, [True, False, False, True]]))
    assert not found[0].any()
    assert found[1].any()
    assert not hyper.add(7, x, torch.ones(2, 1, dtype=torch.bool)).any()


def test_an_adapter_is_made_once_per_layer_set_and_generation() -> None:
    hyper = Hyper("network", SIZES, lively(SIZES), 3)
    sets, which = distinct_sets(torch.tensor([[True, False], [False, True], [True, False]]))
    assert (len(sets), which[0] == which[2], which[0] != which[1]) == (2, True, True)
    first = hyper.adapter(2, (0, 3))
    assert hyper.adapter(2, (0, 3)) is first
    assert hyper.adapter(3, (0,)) is not hyper.adapter(2, (0,))
    assert set(hyper._kept) == {(2, (0, 3), 3), (3, (0,), 3), (2, (0,), 3)}


# ---- beside an FFN


def test_training_goes_through_the_mixture_and_the_shared_network_is_one_set_of_parameters(
    tiny_base: BaseModel,
) -> None:
    ref, layers = base_ref(tiny_base.info), decoder_layers(tiny_base.model)
    sizes = HyperSizes(width=64, bottleneck=8, factor=2, experts={2: 2, 3: 2})
    network, ffns = HyperNetwork(sizes, generator=rng()), {}
    for layer in sizes.experts:
        fresh = [fresh_expert(layer, rank=2, alpha=2.0, base=ref, generator=rng(i)) for i in range(2)]
        modules = [ExpertModule(expert, trainable=False) for expert in fresh]
        ffns[layer] = MixtureFFN(layers[layer].mlp, modules, torch.randn(2, 64, generator=rng()), top_k=1)  # type: ignore[arg-type]
        ffns[layer].beside = TrainedHyper(network, layer)
    ids = torch.tensor([[1, 9, 30, 31, 7]])
    with torch.no_grad():
        plain = tiny_base.model(ids).logits
        with attached(tiny_base.model, ffns):
            torch.testing.assert_close(tiny_base.model(ids).logits, plain, atol=1e-5, rtol=1e-5)
    with attached(tiny_base.model, ffns):
        tiny_base.model(ids).logits.square().mean().backward()
    grad = network.tensors()["up_right.weight"].grad
    assert grad is not None
    assert grad.any()
    assert len({id(p) for ffn in ffns.values() for p in ffn.parameters() if p.requires_grad}) == len(
        list(network.parameters())
    )


# ---- in a repertoire


@pytest.mark.parametrize(("kind", "top_k"), [("network", 2), ("network", 1), ("table", 1)])
def test_the_engine_answers_as_the_attached_model_does(
    workshop: Workshop, make_engine: Callable[..., Engine], kind: HyperKind, top_k: int
) -> None:
    with_hyper(workshop, kind, top_k=top_k)
    text = "12 34 56 78 90"
    wanted = workshop.reference(text, "green", 5, 3)
    assert not torch.allclose(wanted[0], workshop.reference(text, "green", 5, 2)[0], atol=1e-2)
    engine = make_engine(workshop, 3)
    others = [ask(engine, prompt, task=task, max_tokens=5) for prompt, task in (("aaaa", "red"), ("5 6 7", "green"))]
    answer = ask(engine, text, task="green", max_tokens=5).wait()
    assert all(other.wait().error is None for other in others)
    found = answer.logits(wanted.shape[1])
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)


def test_a_task_without_adapters_is_bit_for_bit_what_it_was(workshop: Workshop) -> None:
    with_hyper(workshop, "network", top_k=2)
    text = "aaaa bbbb cccc"
    assert torch.equal(workshop.reference(text, "red", 3, 3), workshop.reference(text, "red", 3, 2))


def test_the_identity_of_a_mixture_tells_of_its_adapters(workshop: Workshop) -> None:
    manifest, _ = with_hyper(workshop, "network", top_k=2)
    opened = open_generation(workshop.repertoire, 3)
    hyper = opened.mixture("green").hyper
    assert hyper is not None
    assert hyper.generation == 3
    assert opened.mixture("red").hyper is None
    assert manifest.tasks[1].hyper is not None
    assert manifest.tasks[1].hyper.digest in manifest.blob_digests()
    ffns = load_mixture(workshop.repertoire, opened, "green", workshop.base.model)
    assert all(isinstance(ffn.beside, nn.Module) for ffn in ffns.values())


def test_a_blob_of_other_shapes_is_a_fault_of_its_task_alone(workshop: Workshop) -> None:
    manifest, _ = with_hyper(workshop, "network", top_k=2)
    ref = manifest.tasks[1].hyper
    assert ref is not None
    wrong = manifest.tasks[1].model_copy(update={"hyper": ref.model_copy(update={"bottleneck": 9})})
    changed = manifest.model_copy(update={"generation": 4, "parent": 3, "tasks": (manifest.tasks[0], wrong)})
    workshop.repertoire.publish(changed, {}, expected=3)
    opened = open_generation(workshop.repertoire, 4)
    assert isinstance(opened.faults["green"], TensorMismatchError)
    assert list(opened.mixtures) == ["red"]


def test_an_older_manifest_has_none_and_a_table_needs_a_single_choice(workshop: Workshop) -> None:
    manifest, _ = with_hyper(workshop, "network", top_k=2)
    text = manifest.to_json().decode()
    older = text.replace(',\n      "hyper": null', "", 1)
    assert len(older) < len(text)
    assert parse_manifest(older.encode(), source="m", generation=3).tasks[0].hyper is None
    with pytest.raises(ManifestError, match="a table of hyper-adapters needs top_k=1, not 2"):
        parse_manifest(text.replace('"kind": "network"', '"kind": "table"').encode(), source="m", generation=3)
