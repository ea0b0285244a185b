"""Routers of every kind on the native step: grouped, general, static, of a whole prompt, blended.

It does not know how the native step weighs.
Read first: torch's operations are out of reach where a test says so, so that nothing falls back to them unseen.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engines import Answer, ask
from native import NativeClass
from repertoires import Workshop

from runtime.engine.engine import Engine
from runtime.engine.llama import LlamaModel
from runtime.kernels.step_kinds import WeightKind
from runtime.model.manifest import TARGETS

MakeEngine = Callable[..., Engine]
TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}
PROMPTS = ("aaaa bbbb", "12 34", "a much longer prompt that spans more than one tile of eight tokens")
GROUPINGS: dict[str, dict[str, object]] = {
    "of the input": {"groups": ("one", "one", "two"), "within": "input"},
    "static": {"groups": ("one", "two", "two"), "within": "static"},
    "with a general expert": {"groups": ("one", "two"), "share": 0.7},
    "of the whole prompt": {"groups": ("one", "two", "one"), "scope": "request"},
    "with a threshold": {"groups": ("one", "one", "two"), "epsilon": 0.4},
}


def publish(workshop: Workshop, grouping: dict[str, object]) -> None:
    workshop.publish("red", "aaaa", targets=TARGETS)
    workshop.publish("green", "12 34", rank=3)
    workshop.publish("blue", "? !", grouping=grouping)


@pytest.fixture
def only_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers on torch's operations cannot be run."""

    def refuse(*_: object) -> None:
        raise AssertionError("the step ran on torch's operations")

    monkeypatch.setattr(LlamaModel, "run_layers", refuse)


def logits(workshop: Workshop, answer: Answer) -> torch.Tensor:
    return answer.wait().logits(workshop.base.info.vocab_size)


@pytest.mark.usefixtures("only_native")
@pytest.mark.parametrize("name", GROUPINGS)
def test_grouped_routers_answer_as_the_attached_model(
    workshop: Workshop, make_engine: MakeEngine, native_class: NativeClass, name: str
) -> None:
    publish(workshop, GROUPINGS[name])
    engine = make_engine(workshop, model_class=native_class("float32"))
    for prompt in PROMPTS:
        got = logits(workshop, ask(engine, prompt, task="blue", max_tokens=4))
        torch.testing.assert_close(got, workshop.reference(prompt, "blue", 4), **TOLERANCE)


@pytest.mark.usefixtures("only_native")
@pytest.mark.parametrize("wish", [{"group_bias": {"one": 2.0}}, {"group_mask": ("two",)}])
def test_groups_that_a_request_shifts_or_masks_are_obeyed(
    workshop: Workshop, make_engine: MakeEngine, native_class: NativeClass, wish: dict[str, object]
) -> None:
    publish(workshop, GROUPINGS["of the input"])
    engine = make_engine(workshop, model_class=native_class("float32"))
    got = logits(workshop, ask(engine, PROMPTS[0], task="blue", max_tokens=4, **wish))  # type: ignore[arg-type]
    expected = workshop.reference(PROMPTS[0], "blue", 4, **wish)  # type: ignore[arg-type]
    torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.usefixtures("only_native")
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_routers_of_all_kinds_answer_alike_alone_and_in_a_batch(
    workshop: Workshop, make_engine: MakeEngine, native_class: NativeClass, weights: WeightKind
) -> None:
    publish(workshop, GROUPINGS["with a general expert"])
    workshop.publish("grey", "! !", kind="arrow")
    engine = make_engine(workshop, model_class=native_class(weights))
    choices: list[dict[str, object]] = [{"task": task} for task in ("red", "green", "blue", "grey")]
    choices.append({"task_weights": {"red": 0.4, "blue": 0.6}})

    def begin(prompt: str, wish: dict[str, object]) -> Answer:
        return ask(engine, prompt, max_tokens=5, **wish)  # type: ignore[arg-type]

    wishes = [(prompt, wish) for prompt in PROMPTS for wish in choices]
    alone = [logits(workshop, begin(*wish)) for wish in wishes]
    together = [begin(*wish) for wish in wishes]
    for expected, answer in zip(alone, together, strict=True):
        assert torch.equal(logits(workshop, answer), expected)


@pytest.mark.parametrize("name", ["of the input", "with a threshold"])
def test_the_weights_of_groups_are_told_as_by_torch(
    workshop: Workshop, make_engine: MakeEngine, native_class: NativeClass, name: str
) -> None:
    publish(workshop, GROUPINGS[name])
    told = []
    for model_class in (native_class("float32"), LlamaModel):
        engine = make_engine(workshop, model_class=model_class)
        told.append(ask(engine, PROMPTS[2], task="blue", explain=True, max_tokens=4).wait().finished.explanation)
    native, torchs = told
    assert len(native) == len(torchs) > 0
    for one, other in zip(native, torchs, strict=True):
        assert one.experts == pytest.approx(other.experts, abs=1e-4)
        assert one.groups == pytest.approx(other.groups, abs=1e-4)
