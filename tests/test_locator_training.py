"""The locator's features, frame and densities, as training makes them."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from runtime.errors import InvalidInputError
from runtime.model.attach import decoder_layers
from runtime.model.base import BaseModel
from runtime.model.density import vae_shapes
from runtime.model.locator import Locator, frame_shapes, pool, project
from runtime.model.manifest import Density, LocatorEntry
from runtime.model.prompt import default_template
from training.config import TrainingConfig
from training.features import features
from training.locator import calibrate, fit_entry, make_background, make_frame
from training.reference_prompts import reference_kinds, reference_prompts

LAYER = 2
CONFIG = TrainingConfig(locator_steps=150, locator_false_abstain=0.02)
DIGIT_WORDS = ("12", "305", "77", "4096", "8", "19", "2024", "63")
ANIMAL_WORDS = ("cow", "goat", "hen", "owl", "fox", "yak", "emu", "ewe")


def prompts(base: BaseModel, words: tuple[str, ...], *, num: int, seed: int) -> list[list[int]]:
    rng, template = random.Random(seed), default_template(base)
    return [template.encode(base.tokenizer, " ".join(rng.choices(words, k=rng.randint(4, 8)))) for _ in range(num)]


def reference(base: BaseModel) -> torch.Tensor:
    template = default_template(base)
    return features(base, [template.encode(base.tokenizer, text) for text in reference_prompts()], LAYER)


def background_of(base: BaseModel, frame: dict[str, torch.Tensor], density: Density) -> dict[str, torch.Tensor] | None:
    return None if density == "vae" else make_background(frame, reference(base), unit_length=True)


def entry(
    base: BaseModel, frame: dict[str, torch.Tensor], name: str, words: tuple[str, ...], density: Density
) -> tuple:
    own = features(base, prompts(base, words, num=200, seed=1), LAYER)
    background = background_of(base, frame, density)
    fitted = fit_entry(
        frame,
        own,
        reference(base),
        CONFIG,
        density=density,
        seed=3,
        background=background,
        unit_length=background is not None,
    )
    found = fitted.calibration
    record = LocatorEntry(digest="0" * 64, mean=found.mean, sd=found.sd, threshold=found.threshold)
    return name, {**fitted.tensors, "mean": fitted.prototype}, record


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_features_are_the_pooled_residual_stream_that_enters_the_layer(tiny_base: BaseModel, layer: int) -> None:
    prompt = prompts(tiny_base, DIGIT_WORDS, num=1, seed=0)[0]
    with torch.no_grad():
        states = tiny_base.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(features(tiny_base, [prompt], layer)[0], pool(states[layer][0]), rtol=0, atol=1e-6)


def test_a_feature_in_parts_holds_prompt_tail_and_words(tiny_base: BaseModel) -> None:
    for prompt in (*prompts(tiny_base, DIGIT_WORDS, num=2, seed=0), [5], [7, 9]):
        found = features(tiny_base, [prompt], LAYER, kind="residual_parts")[0]
        with torch.no_grad():
            states = tiny_base.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        words, stream = (states[layer][0] for layer in (0, LAYER))
        inner = slice(min(1, len(prompt) - 1), None)
        wanted = torch.cat([stream[inner].mean(0), stream[-6:].mean(0), words[inner].mean(0)])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_every_part_of_a_feature_is_projected_and_brought_to_length_by_itself() -> None:
    generator = torch.Generator().manual_seed(5)
    parts = [torch.randn(300, 64, generator=generator) * spread + spread for spread in (0.1, 1.0, 30.0)]
    together, kinds = torch.cat(parts, 1), [i % 9 for i in range(300)]
    frame = make_frame(together, seed=0, density="low_rank", kinds=kinds, num_parts=3)
    assert {name: tuple(tensor.shape) for name, tensor in frame.items()} == frame_shapes(64, "residual_parts")
    alone = [make_frame(part, seed=0, density="low_rank", kinds=kinds) for part in parts]
    for unit_length in (False, True):
        wanted = [project(one, part, unit_length=unit_length) for one, part in zip(alone, parts, strict=True)]
        found = project(frame, together, unit_length=unit_length)
        torch.testing.assert_close(found, torch.cat(wanted, 1), rtol=1e-4, atol=1e-4)


def test_a_frame_makes_prompts_of_one_kind_round_and_keeps_kinds_apart() -> None:
    generator = torch.Generator().manual_seed(6)
    kinds = torch.arange(4000) % 20
    centres = torch.zeros(20, 16)
    centres[:, 3] = torch.arange(20.0)
    rows = centres[kinds] + torch.randn(4000, 16, generator=generator) * torch.linspace(0.5, 4, 16)
    frame = make_frame(rows, seed=0, density="gaussian", kinds=kinds.tolist())
    seen = project(frame, rows)[:, :16].var(0)
    assert float(seen[0] / seen[1:].max()) > 5
    assert float(seen[1:].max() / seen[1:].min()) < 1.2
    one_kind = project(make_frame(rows, seed=0, density="gaussian"), rows)[:, :16].var(0)
    assert float(one_kind.max() / one_kind.min()) < 1.2


def test_a_feature_does_not_depend_on_the_batch_it_is_computed_in(tiny_base: BaseModel) -> None:
    some = [*prompts(tiny_base, ANIMAL_WORDS, num=9, seed=5), [1], list(range(3, 200))]
    alone = torch.cat([features(tiny_base, [prompt], LAYER) for prompt in some])
    for batch_size in (1, 4, 32):
        together = features(tiny_base, some, LAYER, batch_size=batch_size)
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_features_run_no_layer_from_theirs_on(tiny_base: BaseModel) -> None:
    ran: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, layer in enumerate(decoder_layers(tiny_base.model))
    ]
    features(tiny_base, [[1, 2, 3]], LAYER)
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1]
    assert not decoder_layers(tiny_base.model)[LAYER]._forward_pre_hooks


def test_a_frame_follows_from_reference_and_seed_alone() -> None:
    own = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)) * 3 + 2
    own[:, 5] = 1.0
    one, same, other = (make_frame(own, seed=seed) for seed in (4, 4, 5))
    assert {name: tuple(tensor.shape) for name, tensor in one.items()} == frame_shapes(64)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["projection"], other["projection"])
    assert one["deviation"][5] > 0
    assert one["projection"].std() == pytest.approx(1 / math.sqrt(64), rel=0.02)


@pytest.mark.parametrize("density", ["vae", "gaussian", "low_rank"])
def test_two_different_tasks_are_told_apart_and_noise_is_neither(tiny_base: BaseModel, density: Density) -> None:
    frame = make_frame(reference(tiny_base), seed=0, density=density, kinds=reference_kinds())
    words = {"animals": ANIMAL_WORDS, "digits": DIGIT_WORDS}
    entries = [entry(tiny_base, frame, name, some, density) for name, some in words.items()]
    background = background_of(tiny_base, frame, density)
    locator = Locator(
        frame, entries, score="raw", density=density, background=background, unit_length=background is not None
    )
    for name, some in words.items():
        unseen = features(tiny_base, prompts(tiny_base, some, num=100, seed=2), LAYER)
        right = [decision.task for decision in locator.locate(unseen)].count(name)
        assert right >= 93, (name, right)
    rng = random.Random(9)
    noise = [[rng.randrange(3, 259) for _ in range(rng.randint(10, 40))] for _ in range(50)]
    found = [decision.task for decision in locator.locate(features(tiny_base, noise, LAYER))]
    assert found.count(None) >= 45


def test_an_entry_is_the_same_for_the_same_seed_and_another_for_another(tiny_base: BaseModel) -> None:
    frame = make_frame(reference(tiny_base), seed=0)
    own = features(tiny_base, prompts(tiny_base, DIGIT_WORDS, num=40, seed=1), LAYER)
    config = TrainingConfig(locator_steps=3)
    one, same, other = (
        fit_entry(frame, own, reference(tiny_base), config, density="vae", seed=seed) for seed in (1, 1, 2)
    )
    assert {name: tuple(tensor.shape) for name, tensor in one.tensors.items()} == vae_shapes()
    assert one.calibration == same.calibration
    assert all(torch.equal(one.tensors[name], same.tensors[name]) for name in one.tensors)
    assert not torch.equal(one.tensors["encode.weight"], other.tensors["encode.weight"])


def test_the_threshold_lies_between_the_task_and_everything_else() -> None:
    inside = torch.tensor([1.0, 1.2, 0.8, 1.0])
    found = calibrate(inside, torch.linspace(100.0, 200.0, 101), false_abstain=0.0)
    assert found.mean == pytest.approx(1.0)
    assert found.sd == pytest.approx(float(inside.std()))
    assert found.threshold == pytest.approx(1.2 + 0.25 * (100.5 - 1.2))


def test_no_more_prompts_of_the_task_are_given_up_than_allowed_where_others_look_alike() -> None:
    inside = torch.arange(101.0)
    assert calibrate(inside, torch.full((20,), 2.0), false_abstain=0.05).threshold == pytest.approx(95.0)
    assert calibrate(inside, torch.full((20,), 2.0), false_abstain=0.0).threshold == pytest.approx(100.0)


def test_of_a_task_near_to_everything_as_many_prompts_are_refused_as_are_allowed() -> None:
    generator = torch.Generator().manual_seed(4)
    drawn = torch.randn(3600, 64, generator=generator)
    reference, own, fresh = drawn[:300], drawn[300:400] + 0.2, drawn[400:] + 0.2
    frame = make_frame(reference, seed=0, density="low_rank")
    background = make_background(frame, reference, unit_length=True)
    config = replace(CONFIG, locator_false_abstain=0.1)
    fitted = fit_entry(
        frame, own, reference, config, density="low_rank", seed=3, background=background, unit_length=True
    )
    record = LocatorEntry(digest="0" * 64, **vars(fitted.calibration))
    locator = Locator(
        frame,
        [("own", fitted.tensors, record)],
        score="raw",
        density="low_rank",
        background=background,
        unit_length=True,
    )
    refused = [decision.task for decision in locator.locate(fresh)].count(None) / len(fresh)
    assert refused == pytest.approx(0.1, abs=0.03)


def test_every_prompt_of_a_handful_is_held_out_once() -> None:
    reference = torch.randn(60, 64, generator=torch.Generator().manual_seed(4))
    frame = make_frame(reference, seed=0, density="gaussian")
    own = torch.randn(9, 64, generator=torch.Generator().manual_seed(5))
    found = fit_entry(frame, own, reference, CONFIG, density="gaussian", seed=3).calibration
    seen = project(frame, own)
    alone = [float((row - torch.cat([seen[:i], seen[i + 1 :]]).mean(0)).square().mean()) for i, row in enumerate(seen)]
    assert found.mean == pytest.approx(sum(alone) / 9, rel=1e-3)


def test_too_few_examples_for_a_density_are_refused_by_number() -> None:
    own = torch.zeros(7, 64)
    with pytest.raises(InvalidInputError, match=r"examples=7: the locator needs 8"):
        fit_entry(make_frame(torch.randn(9, 64), seed=0), own, own, CONFIG, density="vae", seed=0)
