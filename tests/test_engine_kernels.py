"""The engine with its mixtures on the GPU's kernels, run by Triton's interpreter: the answers of torch's products."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from engines import ask
from repertoires import Workshop

from runtime.engine.engine import Engine
from runtime.engine.llama import LlamaModel
from runtime.engine.stage import LayerPacks, Stage
from runtime.engine.staged_kernels import kernel_update, most_experts
from runtime.kernels.triton_interpreter import interpret
from runtime.kernels.triton_metadata import build_metadata
from runtime.kernels.triton_mixture import Launch
from runtime.model.attach import fresh_expert
from runtime.model.expert import Expert
from runtime.model.generation import base_ref, open_generation
from runtime.model.manifest import TARGETS

MakeEngine = Callable[..., Engine]
GROUPING = {"groups": ("one", "two", "two"), "scope": "token", "within": "input"}


class Counting:
    """Runs kernels in the interpreter and counts them by name."""

    def __init__(self) -> None:
        self.ran: dict[str, int] = {}

    def __call__(self, launch: Launch) -> None:
        self.ran[launch.variant.kernel] = self.ran.get(launch.variant.kernel, 0) + 1
        interpret(launch)


def publish(workshop: Workshop) -> None:
    """Ranks 3, 20 and 5; one without attention; top-1, Arrow and a grouped router with a general share."""
    workshop.publish("red", "aaaa", rank=3, targets=TARGETS, top_k=1)
    workshop.publish("green", "12 34", rank=20, kind="arrow")
    workshop.publish("blue", "? !", rank=5, targets=TARGETS, grouping=GROUPING)


def logits(workshop: Workshop, answer: Any) -> torch.Tensor:
    found: torch.Tensor = answer.wait().logits(workshop.base.info.vocab_size)
    return found


@pytest.mark.parametrize("task", ["red", "green", "blue"])
def test_an_answer_with_the_kernels_is_that_of_the_reference(
    workshop: Workshop, make_engine: MakeEngine, task: str
) -> None:
    publish(workshop)
    launch = Counting()
    engine = make_engine(workshop, model_class=partial(LlamaModel, launch=launch))
    prompt = "hello there, this is long enough for a chunk of many tokens"
    answer = ask(engine, prompt, task=task, max_tokens=3)
    torch.testing.assert_close(logits(workshop, answer), workshop.reference(prompt, task, 3), rtol=1e-4, atol=1e-4)
    assert launch.ran.keys() == {"grouped_shrink", "grouped_expand", "decode_shrink", "decode_expand"}


def test_a_mixed_batch_of_all_kinds_answers_alike_with_the_kernels(workshop: Workshop, make_engine: MakeEngine) -> None:
    publish(workshop)
    told = []
    for launch in (None, Counting()):
        engine = make_engine(workshop, model_class=partial(LlamaModel, launch=launch))
        wishes = [("abc", "red"), ("abcd", "green"), ("x" * 9, "blue"), ("plain", None)]
        with engine.together():
            answers = [ask(engine, text, task=task, base_only=task is None, max_tokens=3) for text, task in wishes]
        told.append([(answer.wait().tokens, logits(workshop, answer)) for answer in answers])
    for (tokens, expected), (others, got) in zip(*told, strict=True):
        assert tokens == others
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_tasks_that_answer_together_add_up_with_the_kernels(workshop: Workshop, make_engine: MakeEngine) -> None:
    publish(workshop)
    told = []
    for launch in (None, Counting()):
        engine = make_engine(workshop, model_class=partial(LlamaModel, launch=launch))
        answer = ask(engine, "abc", task_weights={"red": 1.0, "green": 2.0, "blue": 1.0}, max_tokens=3)
        told.append(logits(workshop, answer))
    torch.testing.assert_close(told[1], told[0], rtol=1e-4, atol=1e-4)


def test_the_plain_base_launches_nothing(workshop: Workshop, make_engine: MakeEngine) -> None:
    publish(workshop)
    launch = Counting()
    engine = make_engine(workshop, model_class=partial(LlamaModel, launch=launch))
    ask(engine, "abc", base_only=True, max_tokens=2).wait()
    assert launch.ran == {}


@pytest.mark.parametrize(("names", "most"), [(("red",), 1), (("green",), 2), (("red", "green"), 2), (("blue",), 3)])
def test_experts_per_token_follow_from_the_routers(workshop: Workshop, names: tuple[str, ...], most: int) -> None:
    publish(workshop)
    generation, ref = open_generation(workshop.repertoire), base_ref(workshop.base.info)
    mixtures = [generation.mixture(name) for name in names]

    def fetch(digest: str, layer: int) -> Expert:
        generator = torch.Generator().manual_seed(int(digest[:8], 16))
        return fresh_expert(layer, rank=2, alpha=2.0, base=ref, generator=generator, targets=TARGETS)

    packs = LayerPacks(dtype=torch.float32, device=torch.device("cpu"))
    stage = Stage([(mixture, fetch) for mixture in mixtures], packs)
    layer = stage.layers[3]
    assert most_experts(layer.router) == layer.kernel_columns.k_max == most
    rows = torch.arange(1, 1 + len(mixtures)).repeat(50)
    weights = layer.router.weigh(torch.randn(len(rows), layer.router.weight.shape[1]), rows)
    assert int((weights != 0).sum(1).max()) <= most
    metadata = layer.kernel_columns.metadata(weights)
    torch.testing.assert_close(metadata.weights.sum(1), weights.sum(1))


@pytest.mark.parametrize("shift", [0, 1])
def test_outputs_that_no_compiled_kernel_takes_are_computed_beside(shift: int) -> None:
    torch.manual_seed(0)
    a, b, x = torch.randn(4, 32), torch.randn(4, 24), torch.randn(2, 32)
    whole = torch.zeros(2, 48 + shift)
    seen: list[tuple[int, int]] = []

    def launch(step: Launch) -> None:
        if "y" in step.arguments:
            y = step.arguments["y"]
            assert isinstance(y, torch.Tensor)
            seen.append((y.data_ptr() % 16, y.stride(0)))
        interpret(step)

    metadata = build_metadata(torch.tensor([[0], [1]]), torch.tensor([[0.5], [2.0]]), 2)
    kernel_update(a, b, ("one", "two", "two", "two"), ("one", "two")).add(
        whole[:, shift : shift + 24], x, metadata, launch
    )
    expected = torch.stack([0.5 * (x[0] @ a[:1].t()) @ b[:1], 2 * (x[1] @ a[1:].t()) @ b[1:]])
    torch.testing.assert_close(whole[:, shift : shift + 24], expected, rtol=1e-4, atol=1e-4)
    assert not whole[:, :shift].any()
    assert not whole[:, shift + 24 :].any()
    assert seen == [(0, 24 if shift else 48)]
