"""Several tasks that answer together: in every linear the sum of their mixtures, each times its share.

It does not know how mixtures are packed.
Read first: the reference adds up, linear by linear, what each task attached alone would add to the Hugging Face model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from engines import Answer, ask
from native import NativeClass
from repertoires import Workshop

from runtime.engine.engine import Engine
from runtime.engine.request import Request
from runtime.errors import InvalidInputError, UnknownTaskError
from runtime.model.attach import MixtureFFN, hold_mixture
from runtime.model.blend import blended
from runtime.model.generation import open_generation
from runtime.model.manifest import ATTENTION_TARGETS, FFN_TARGETS, TARGETS

MakeEngine = Callable[..., Engine]
Weights = dict[str, float]
TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}


@pytest.fixture
def kinds(workshop: Workshop) -> Workshop:
    """Red keeps the K largest, green is Arrow's without experts in layer 3, blue is grouped; two update attention."""
    workshop.publish("red", "aaaa bbbb cccc", targets=TARGETS)
    workshop.publish("green", "12 34 56 78 90", rank=2, targets=("q", "v", "down"), kind="arrow", layers=[2])
    workshop.publish("blue", "? ! ? ! ? ! ? !", grouping={"groups": ("function", "function", "domain")})
    return workshop


@contextmanager
def adding_up(workshop: Workshop, text: str, weights: Mapping[str, float]) -> Iterator[None]:
    """The base with hooks: `y + sum_t lambda_t * (y_t - y)`, y_t as with task t alone, in every linear of a layer."""
    generation, model = open_generation(workshop.repertoire), workshop.base.model
    held = {}
    for task in weights:
        mixture = workshop.mixture(text, task, bias={}, mask=())
        held[task] = hold_mixture(workshop.repertoire, generation, mixture, model)
    with ExitStack() as stack:
        for number, layer in enumerate(model.model.layers):
            own = [(share, held[task][number]) for task, share in weights.items() if number in held[task]]
            for block, targets in ((layer.mlp, FFN_TARGETS), (layer.self_attn, ATTENTION_TARGETS)):
                routed: list[torch.Tensor] = []
                hook = block.register_forward_pre_hook(partial(route, routed, own), with_kwargs=True)
                stack.callback(hook.remove)
                for target in targets:
                    linear = getattr(block, f"{target}_proj")
                    stack.callback(linear.register_forward_hook(partial(update, routed, own, target)).remove)
        yield


def route(routed: list[torch.Tensor], own: list[tuple[float, MixtureFFN]], _block: Any, args: Any, kwargs: Any) -> None:
    x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    routed[:] = [ffn.route(x.reshape(-1, x.shape[-1])) for _, ffn in own]


def update(
    routed: list[torch.Tensor],
    own: list[tuple[float, MixtureFFN]],
    target: Any,
    _linear: Any,
    inputs: tuple[torch.Tensor, ...],
    y: torch.Tensor,
) -> torch.Tensor:
    x, flat = inputs[0].reshape(-1, inputs[0].shape[-1]), y.reshape(-1, y.shape[-1])
    alone = [ffn.updated(target, x, flat, routed[i]) - flat for i, (_, ffn) in enumerate(own)]
    return (flat + sum(share * each for (share, _), each in zip(own, alone, strict=True))).view_as(y)


def reference(workshop: Workshop, text: str, weights: Weights, count: int) -> torch.Tensor:
    """Logits [count, V] of greedy decoding."""
    ids = open_generation(workshop.repertoire).template.encode(workshop.base.tokenizer, text)
    rows = []
    with adding_up(workshop, text, weights), torch.no_grad():
        for _ in range(count):
            rows.append(workshop.base.model(torch.tensor([ids]), use_cache=False).logits[0, -1])
            ids = [*ids, int(rows[-1].argmax())]
    return torch.stack(rows)


def logits(workshop: Workshop, answer: Answer) -> torch.Tensor:
    return answer.wait().logits(workshop.base.info.vocab_size)


BLENDS: list[Weights] = [
    {"red": 0.7, "green": 0.3},
    {"red": 0.3, "blue": 0.7},
    {"red": 0.2, "green": 0.3, "blue": 0.5},
]


def test_tasks_answer_together_in_one_batch_as_the_sum_of_their_shares(
    kinds: Workshop, make_engine: MakeEngine
) -> None:
    engine = make_engine(kinds)
    alone: list[Weights] = [{"green": 1.0}, {"blue": 1.0}]
    texts = [f"{i} and {i} are one" for i in range(5)]
    with engine.together():
        answers = [ask(engine, t, max_tokens=4, task_weights=w) for t, w in zip(texts, BLENDS, strict=False)]
        answers += [ask(engine, t, max_tokens=4, task=next(iter(w))) for t, w in zip(texts[3:], alone, strict=True)]
    for text, weights, answer in zip(texts, BLENDS + alone, answers, strict=True):
        torch.testing.assert_close(logits(kinds, answer), reference(kinds, text, weights, 4), **TOLERANCE)
    other = kinds.reference(texts[0], "red", 4)
    assert (logits(kinds, answers[0]) - other).abs().max() > 0.01, "the other task has a say"


def test_the_native_step_answers_so_too(
    three_tasks: Workshop, make_engine: MakeEngine, native_class: NativeClass
) -> None:
    engine = make_engine(three_tasks, model_class=native_class("float32"))
    weights = {"red": 0.7, "green": 0.3}
    answer = ask(engine, "hello", max_tokens=4, task_weights=weights)
    torch.testing.assert_close(logits(three_tasks, answer), reference(three_tasks, "hello", weights, 4), **TOLERANCE)


def test_weights_of_whole_prompts_are_fixed_before_they_are_added_up(
    workshop: Workshop, make_engine: MakeEngine
) -> None:
    workshop.publish("red", "aaaa")
    workshop.publish("green", "12 34", grouping={"groups": ("a", "b"), "scope": "request"})
    weights = {"red": 0.4, "green": 0.6}
    answer = ask(make_engine(workshop), "hello", max_tokens=4, task_weights=weights)
    torch.testing.assert_close(logits(workshop, answer), reference(workshop, "hello", weights, 4), **TOLERANCE)


def test_all_of_the_weight_on_one_task_is_the_pin(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(three_tasks)
    text = "the same words for both, and enough of them for a block"
    ask(engine, text, task="red").wait()
    pinned = ask(engine, text, task="red").wait()
    weighted = ask(engine, text, task_weights={"red": 2.0, "blue": 0.0}).wait()
    assert torch.equal(logits(three_tasks, weighted), logits(three_tasks, pinned))
    assert (weighted.located.task, weighted.located.how) == ("red", "weighted")
    assert weighted.located.task_weights == {"red": 1.0}
    assert {use.digest for use in weighted.located.experts} == {use.digest for use in pinned.located.experts}
    assert weighted.finished.usage.cached_tokens > 0, "it is the same mixture, so what the pin left is known"


def test_weights_are_relative_and_the_report_names_the_shares(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(three_tasks)
    first = ask(engine, "hello", task_weights={"red": 0.7, "green": 0.3}).wait()
    second = ask(engine, "hello", task_weights={"green": 3.0, "red": 7.0}).wait()
    torch.testing.assert_close(logits(three_tasks, second), logits(three_tasks, first), atol=1e-5, rtol=1e-5)
    located = second.located
    assert (located.task, located.how, located.scores) == (None, "weighted", ())
    assert located.task_weights == pytest.approx({"red": 0.7, "green": 0.3})
    manifest = three_tasks.repertoire.manifest()
    seen = {digest for task in ("red", "green") for digest in manifest.task(task).router.visible}
    assert {use.digest for use in located.experts} == seen, "the union of what the tasks see"


def test_an_explanation_adds_up_to_one_by_the_shares(workshop: Workshop, make_engine: MakeEngine) -> None:
    workshop.publish("red", "aaaa", top_k=1)
    workshop.publish("green", "12 34", grouping={"groups": ("a", "b")})
    answer = ask(make_engine(workshop), "hello", task_weights={"red": 0.7, "green": 0.3}, explain=True).wait()
    for layer in answer.finished.explanation:
        assert sum(layer.experts.values()) == pytest.approx(1.0, abs=1e-5)
        assert sum(layer.groups.values()) == pytest.approx(0.3, abs=1e-5)
    assert [layer.layer for layer in answer.finished.explanation] == [2, 3]


def test_a_continuation_is_scored_and_choices_are_given_by_the_blend(kinds: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(kinds)
    fields = {"task_weights": BLENDS[2], "keep_logits": False}
    scored = ask(engine, "hello", continuation=" there", **fields).wait().finished.scored
    generation = open_generation(kinds.repertoire)
    context = generation.template.encode(kinds.base.tokenizer, "hello")
    given = generation.template.encode_part(kinds.base.tokenizer, " there", plain=True)
    with adding_up(kinds, "hello", BLENDS[2]), torch.no_grad():
        rows = kinds.base.model(torch.tensor([context + given]), use_cache=False).logits[0, len(context) - 1 : -1]
    expected = torch.log_softmax(rows, dim=1)[torch.arange(len(given)), torch.tensor(given)].tolist()
    assert [item.logprob for item in scored] == pytest.approx(expected, abs=1e-3)
    alone = ask(engine, "hello", **fields).wait()
    twins = ask(engine, "hello", sampling={"n": 2}, **fields).wait()
    assert [twins.choice_tokens(choice) for choice in (0, 1)] == [alone.tokens] * 2


def test_blends_of_other_weights_share_no_adapted_prefix(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(three_tasks)
    text = "the same words for both, and enough of them for a block"
    blends = ({"red": 1.0, "green": 1.0}, {"red": 1.0, "green": 2.0}, {"red": 1.0, "blue": 1.0})
    cached = [ask(engine, text, task_weights=weights).wait().finished.usage.cached_tokens for weights in blends]
    assert cached == [0, 0, 0]
    assert ask(engine, text, task_weights=blends[1]).wait().finished.usage.cached_tokens > 0


def test_a_blend_of_one_is_the_mixture_and_the_order_of_two_is_its_identity(three_tasks: Workshop) -> None:
    generation = open_generation(three_tasks.repertoire)
    red, green = generation.mixture("red"), generation.mixture("green")
    assert blended([(1.0, red)]) is red
    digests = {blended([(share, red), (1 - share, green)]).digest for share in (0.3, 0.7)}
    assert len(digests | {red.digest, green.digest}) == 4


def test_a_task_with_hyper_adapters_is_refused(three_tasks: Workshop) -> None:
    generation = open_generation(three_tasks.repertoire)
    hyper: Any = "adapters"
    red, green = replace(generation.mixture("red"), hyper=hyper), generation.mixture("green")
    with pytest.raises(InvalidInputError, match="task_weights='red': has hyper-adapters"):
        blended([(0.5, red), (0.5, green)])


def test_a_task_that_does_not_exist_is_refused_whatever_it_weighs(
    three_tasks: Workshop, make_engine: MakeEngine
) -> None:
    engine = make_engine(three_tasks)
    with pytest.raises(UnknownTaskError, match="pink"):
        ask(engine, "x", task_weights={"red": 1.0, "pink": 0.0})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "a"}, "excludes task"),
        ({"default_task": "a"}, "excludes default_task"),
        ({"abstain_fails": True}, "excludes abstain_fails"),
        ({"group_bias": {"g": 1.0}}, "excludes group_bias"),
        ({"group_mask": frozenset("g")}, "excludes group_mask"),
        ({"base_only": True}, "means nothing together with base_only"),
        ({"locate_only": True}, "means nothing together with locate_only"),
        ({"task_weights": {"a": -0.1, "b": 1.0}}, r"task_weights\[a\]=-0.1: must be between"),
        ({"task_weights": {"a": float("nan")}}, r"task_weights\[a\]=nan: must be between"),
        ({"task_weights": {"a": float("inf")}}, r"task_weights\[a\]=inf: must be between"),
        ({"task_weights": {"a": 0.0, "b": 0.0}}, "must not all be zero"),
        ({"task_weights": {f"t{n}": 1.0 for n in range(9)}}, "task_weights=9: at most 8 tasks"),
    ],
)
def test_weights_that_cannot_be_followed_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Request(request_id="r", text="x", **{"task_weights": {"a": 0.7, "b": 0.3}, **fields})
