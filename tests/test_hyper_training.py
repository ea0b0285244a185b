"""Training hyper-adapters: they are learned with the experts, served as they were trained, and leave the old alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from exporters.constant_mixture import constant_weights
from runtime.errors import InvalidInputError
from runtime.model.attach import MixtureFFN, attached, load_mixture
from runtime.model.base import BaseModel
from runtime.model.generation import open_generation
from runtime.model.hyper_module import hyper_linears
from runtime.model.hyper_sets import stored_shapes
from runtime.model.prompt import default_template
from runtime.model.repertoire import Repertoire
from runtime.model.routers import hyper_sizes
from training.adapters_beside import AdaptersBeside, attach_adapters
from training.batches import encode_row
from training.config import TrainingConfig
from training.data import Example, TaskData
from training.grow import add_task
from training.hyper import attach_hyper
from training.mixtures import fresh_experts, new_mixture
from training.steps import Steps

CONFIG = TrainingConfig(
    first_layer=2, max_steps=6, learning_rate=1e-2, locator_steps=5, rank=2, batch_size=8, store_dtype="float32"
)
HYPER = dataclasses.replace(CONFIG, hyper_bottleneck=6, hyper_factor=2)


def task_of(name: str, letters: str) -> TaskData:
    rows = tuple(Example(letter * (5 + i), str(place)) for i in range(8) for place, letter in enumerate(letters))
    return TaskData(name, rows, rows[:4])


def logits(repertoire: Repertoire, base: BaseModel, task: str, generation: int) -> torch.Tensor:
    opened = open_generation(repertoire, generation)
    ids = torch.tensor([opened.template.encode(base.tokenizer, "aaa bbb ??")])
    with torch.no_grad(), attached(base.model, load_mixture(repertoire, opened, task, base.model)):
        found: torch.Tensor = base.model(ids).logits
    return found


def test_a_number_that_a_hypernetwork_writes_moves_no_further_than_one_that_is_trained_itself(
    tiny_base: BaseModel,
) -> None:
    new = fresh_experts(tiny_base, [2, 3], HYPER, seed_name="two")
    ffns = new_mixture(tiny_base, [], new, name="two", first_layer=2, config=HYPER)
    network = attach_hyper(tiny_base, ffns, name="two", config=HYPER)
    assert network is not None
    before = network.weights()
    template = default_template(tiny_base)
    rows = [encode_row(tiny_base, template, row.input, row.output, max_tokens=64) for row in task_of("two", "cd").train]
    steps = Steps(tiny_base, ffns, rows, name="two", config=HYPER, num_steps=1, order_seed=0)
    with attached(tiny_base.model, ffns):
        steps.step()
    moved = {name: float((tensor - before[name]).abs().max()) for name, tensor in network.weights().items()}
    assert moved["up_right.bias"] == pytest.approx(HYPER.learning_rate, rel=1e-3)
    assert moved["up_right.weight"] == pytest.approx(HYPER.learning_rate / 128, rel=1e-3)
    assert sorted(id(weight) for weight in hyper_linears(ffns.values())) == sorted(
        id(tensor) for name, tensor in network.tensors().items() if name.endswith(".weight")
    )


@pytest.mark.parametrize(("top_k", "kind"), [(2, "network"), (1, "table")])
def test_a_task_is_published_with_what_was_trained_beside_its_experts(
    tiny_base: BaseModel, tmp_path: Path, top_k: int, kind: str
) -> None:
    repertoire = Repertoire(tmp_path)
    add_task(repertoire, tiny_base, task_of("one", "ab"), CONFIG)
    plain = logits(repertoire, tiny_base, "one", 1)
    manifest = add_task(repertoire, tiny_base, task_of("two", "cd"), dataclasses.replace(HYPER, top_k=top_k))
    task = manifest.tasks[1]
    assert task.hyper is not None
    assert (task.hyper.kind, task.hyper.bottleneck, task.hyper.factor) == (kind, 6, 2)
    opened = open_generation(repertoire)
    hyper = opened.mixture("two").hyper
    assert hyper is not None
    sizes = hyper_sizes(manifest, task, task.hyper)
    assert dict(sizes.experts) == {2: 2, 3: 2}
    assert {name: tuple(tensor.shape) for name, tensor in hyper.weights.items()} == stored_shapes(hyper.kind, sizes)
    x, chosen = torch.randn(4, 64), torch.eye(2, dtype=torch.bool)[[0, 1, 0, 1]]
    assert hyper.add(3, x, chosen).any()
    assert task.trained_parameters > manifest.tasks[0].trained_parameters
    assert torch.equal(logits(repertoire, tiny_base, "one", 2), plain)


def test_a_task_that_arrives_later_changes_no_adapter_of_an_older_one(tiny_base: BaseModel, tmp_path: Path) -> None:
    repertoire = Repertoire(tmp_path)
    for name, letters in (("one", "ab"), ("two", "cd")):
        add_task(repertoire, tiny_base, task_of(name, letters), HYPER)
    before = logits(repertoire, tiny_base, "two", 2)
    add_task(repertoire, tiny_base, task_of("three", "ef"), HYPER)
    assert torch.equal(logits(repertoire, tiny_base, "two", 3), before)
    sizes = [open_generation(repertoire).mixture(name).hyper for name in ("one", "two", "three")]
    assert [dict(hyper.sizes.experts)[3] for hyper in sizes if hyper] == [1, 2, 3]


def test_an_adapter_that_follows_the_choice_is_no_part_of_a_fixed_mixture(tiny_base: BaseModel, tmp_path: Path) -> None:
    manifest = add_task(Repertoire(tmp_path), tiny_base, task_of("one", "ab"), HYPER)
    with pytest.raises(InvalidInputError, match="it has hyper-adapters beside its experts"):
        constant_weights(manifest, "one", None)
    assert constant_weights(manifest, "one", "uniform")


# ---- what it is compared with


def mixtures_of(base: BaseModel) -> dict[int, MixtureFFN]:
    new = fresh_experts(base, range(2, 4), CONFIG, seed_name="new")
    old = fresh_experts(base, range(2, 4), CONFIG, seed_name="old")
    return new_mixture(base, [old], new, name="new", first_layer=2, config=CONFIG)


@pytest.mark.parametrize("per_expert", [False, True])
def test_plain_adapters_beside_the_experts_have_about_the_parameters_asked_for(
    tiny_base: BaseModel, per_expert: bool
) -> None:
    ffns, generator = mixtures_of(tiny_base), torch.Generator().manual_seed(0)
    total = attach_adapters(ffns, per_expert=per_expert, parameters=9000, width=64, generator=generator)
    assert total == pytest.approx(9000, rel=0.1)
    x = torch.randn(5, 64, generator=generator)
    for ffn in ffns.values():
        assert ffn.beside is not None
        assert not ffn.beside(x, torch.ones(5, 2, dtype=torch.bool)).any()


def test_a_free_adapter_belongs_to_an_expert_and_a_token_gets_the_sum_of_its_own() -> None:
    generator = torch.Generator().manual_seed(1)
    free = AdaptersBeside(3, 8, 4, generator=generator)
    with torch.no_grad():
        free.up.normal_(generator=generator)
        free.up_bias.normal_(generator=generator)
    x, one = torch.randn(2, 8, generator=generator), torch.eye(3, dtype=torch.bool)
    alone = [free(x, one[[e, e]]) for e in range(3)]
    chosen = torch.tensor([[True, True, False], [False, False, True]])
    torch.testing.assert_close(free(x, chosen), torch.stack([alone[0][0] + alone[1][0], alone[2][1]]))
    static = AdaptersBeside(1, 8, 4, generator=generator)
    with torch.no_grad():
        static.up.normal_(generator=generator)
    torch.testing.assert_close(static(x, chosen), static(x, ~chosen))
