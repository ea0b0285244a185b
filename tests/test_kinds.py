"""Router kinds and updates of attention in the engine: equal to the mixture attached to the Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engines import ask
from repertoires import Workshop

from runtime.engine.engine import Engine
from runtime.engine.request import Request
from runtime.errors import InvalidInputError
from runtime.model.generation import open_generation
from runtime.model.manifest import ATTENTION_TARGETS, TARGETS, Target

MakeEngine = Callable[..., Engine]
TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}
GROUPS = ("function", "function", "domain")


def publish_kinds(workshop: Workshop, **grouping: object) -> None:
    """Tasks red, green, blue with experts in attention and FFN; blue's router is grouped over the three."""
    workshop.publish("red", "aaaa bbbb cccc", targets=TARGETS)
    workshop.publish("green", "12 34 56 78 90", rank=2, targets=("q", "v", "down"), kind="arrow")
    general = grouping.get("share", 1.0) != 1.0
    workshop.publish("blue", "? ! ? ! ? ! ? !", grouping={"groups": GROUPS[1:] if general else GROUPS, **grouping})


@pytest.mark.parametrize("targets", [("q",), ("k",), ("v",), ("o",), ATTENTION_TARGETS, ("v", "up"), TARGETS])
def test_experts_of_any_linears_answer_as_attached_to_the_model(
    workshop: Workshop, make_engine: MakeEngine, targets: tuple[Target, ...]
) -> None:
    for name in ("red", "green"):
        workshop.publish(name, name, targets=targets)
    answer = ask(make_engine(workshop), "aaaa bbbb", task="green", max_tokens=4).wait()
    got = answer.logits(workshop.base.info.vocab_size)
    torch.testing.assert_close(got, workshop.reference("aaaa bbbb", "green", 4), **TOLERANCE)
    assert (got - workshop.reference("aaaa bbbb", None, 4)).abs().max() > 0.01


@pytest.mark.parametrize(
    "grouping",
    [
        {"scope": "token", "within": "input"},
        {"scope": "token", "within": "static", "epsilon": 0.2},
        {"scope": "request", "within": "input", "epsilon": 0.2},
        {"scope": "request", "within": "static", "share": 0.6},
        {"scope": "token", "within": "input", "share": 0.6},
    ],
)
def test_all_kinds_in_one_batch_answer_as_each_attached_to_the_model(
    workshop: Workshop, make_engine: MakeEngine, grouping: dict[str, object]
) -> None:
    publish_kinds(workshop, **grouping)
    engine = make_engine(workshop)
    wishes = [
        {"task": "red"},
        {"task": "green"},
        {"task": "blue"},
        {"task": "blue", "group_bias": {"domain": 3.0}},
        {"task": "blue", "group_mask": frozenset({"function"})},
        {"base_only": True},
    ]
    texts = [f"{i} and {i} are one" for i in range(len(wishes))]
    answers = [ask(engine, text, max_tokens=4, **wish) for text, wish in zip(texts, wishes, strict=True)]
    for text, wish, answer in zip(texts, wishes, answers, strict=True):
        control = {name: value for name, value in wish.items() if name.startswith("group")}
        expected = workshop.reference(text, wish.get("task"), 4, **control)  # type: ignore[arg-type]
        got = answer.wait().logits(workshop.base.info.vocab_size)
        torch.testing.assert_close(got, expected, **TOLERANCE)


def test_a_masked_group_is_not_even_loaded(workshop: Workshop, make_engine: MakeEngine) -> None:
    publish_kinds(workshop)
    engine = make_engine(workshop)
    answer = ask(engine, "x", task="blue", group_mask=frozenset({"function"})).wait()
    own = workshop.repertoire.manifest().task("blue").experts
    assert [use.digest for use in answer.located.experts] == [own]


def test_an_explanation_gives_the_mean_weights_of_experts_and_groups_per_layer(
    workshop: Workshop, make_engine: MakeEngine
) -> None:
    publish_kinds(workshop, share=0.6)
    engine = make_engine(workshop)
    red, green, blue = (entry.digest for entry in workshop.repertoire.manifest().experts)
    explained = ask(engine, "hello", task="blue", explain=True, max_tokens=5).wait().finished.explanation
    assert [layer.layer for layer in explained] == [2, 3]
    for layer in explained:
        assert layer.experts.keys() == {red, green, blue}
        assert layer.experts[red] == pytest.approx(0.4)
        assert layer.groups == pytest.approx({"function": layer.experts[green], "domain": layer.experts[blue]})
        assert sum(layer.groups.values()) == pytest.approx(0.6)
    shifted = ask(engine, "hello", task="blue", explain=True, group_bias={"domain": 50.0}).wait().finished.explanation
    assert [layer.groups["domain"] for layer in shifted] == pytest.approx([0.6, 0.6])
    assert ask(engine, "hello", task="blue").wait().finished.explanation == ()
    choices = ask(engine, "hello", task="blue", explain=True, sampling={"n": 2}, keep_logits=False, max_tokens=5)
    for one, both in zip(explained, choices.wait().finished.explanation, strict=True):
        assert both.experts == pytest.approx(
            one.experts, abs=0.01
        )  # the same answer twice; its first token counts once
    assert ask(engine, "hello", task="red", explain=True).wait().finished.explanation[0].groups == {}


def test_weights_of_scope_request_do_not_change_from_token_to_token(
    workshop: Workshop, make_engine: MakeEngine
) -> None:
    publish_kinds(workshop, scope="request")
    engine = make_engine(workshop)
    one, many = (ask(engine, "hello", task="blue", explain=True, max_tokens=n).wait() for n in (1, 9))
    expected = workshop.mixture("hello", "blue", bias={}, mask=[])
    for layer, longer in zip(one.finished.explanation, many.finished.explanation, strict=True):
        router = expected.routers[layer.layer]
        assert router.constant is not None
        weights = dict(zip(router.experts, router.constant.tolist(), strict=True))
        assert layer.experts == pytest.approx(weights, abs=1e-5)
        assert longer.experts == pytest.approx(layer.experts, abs=1e-6)


def test_a_wish_that_no_router_can_follow_is_refused_when_it_arrives(
    workshop: Workshop, make_engine: MakeEngine
) -> None:
    publish_kinds(workshop)
    engine = make_engine(workshop)
    for task in ("blue", None):
        with pytest.raises(InvalidInputError, match="group_bias='tone': the groups of"):
            ask(engine, "x", task=task, group_bias={"tone": 1.0})
    with pytest.raises(InvalidInputError, match=r"group_mask=.*leaves no group"):
        ask(engine, "x", task="blue", group_mask=frozenset(GROUPS))
    with pytest.raises(InvalidInputError, match="task red has no grouped router"):
        ask(engine, "x", task="red", group_bias={"domain": 1.0})


def test_a_wish_fails_the_request_when_the_task_that_is_found_has_no_groups(
    workshop: Workshop, make_engine: MakeEngine
) -> None:
    publish_kinds(workshop)
    engine = make_engine(workshop)
    found = ask(engine, "aaaa bbbb cccc", group_bias={"domain": 1.0}).wait()
    assert isinstance(found.error, InvalidInputError)
    assert "task red has no grouped router" in str(found.error)
    assert ask(engine, "? ! ? ! ? ! ? !", group_bias={"domain": 1.0}).wait().located.task == "blue"


def test_a_wish_fails_the_request_when_no_task_is_found(workshop: Workshop, make_engine: MakeEngine) -> None:
    workshop.publish("red", "aaaa", threshold=1e-9)
    workshop.publish("blue", "? !", threshold=1e-9, grouping={"groups": ("function", "domain")})
    answer = ask(make_engine(workshop), "zzz", group_bias={"domain": 1.0}).wait()
    assert isinstance(answer.error, InvalidInputError)
    assert "no task was found" in str(answer.error)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group_bias": {"a": 1.0}, "base_only": True}, "group_bias=.*means nothing together with base_only"),
        ({"explain": True, "locate_only": True}, "explain=True: means nothing together with locate_only"),
        ({"group_bias": {"a": 101.0}}, r"group_bias\[a\]=101.0: must be within"),
        ({"group_bias": {"a": float("nan")}}, r"group_bias\[a\]=nan"),
    ],
)
def test_a_request_checks_its_wishes(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Request(request_id="r", text="x", **fields)  # type: ignore[arg-type]


def test_a_parameter_of_a_router_changes_the_identity_of_its_mixture(workshop: Workshop) -> None:
    publish_kinds(workshop)
    generation = open_generation(workshop.repertoire)
    manifest = generation.manifest
    from runtime.model.routers import make_mixture

    task = manifest.task("blue")
    digests = {generation.mixtures["blue"].digest}
    tensors = workshop.repertoire.read_tensors(task.router.digest, _shapes(workshop))
    for field, value in (("tau_group", 9.0), ("epsilon", 0.1), ("scope", "request")):
        grouping = task.router.grouping.model_copy(update={field: value})  # type: ignore[union-attr]
        other = task.model_copy(update={"router": task.router.model_copy(update={"grouping": grouping})})
        digests.add(make_mixture(manifest, other, tensors).digest)
    assert len(digests) == 4


def _shapes(workshop: Workshop) -> dict[str, tuple[int, ...]]:
    from runtime.model.routers import router_shapes

    manifest = workshop.repertoire.manifest()
    return router_shapes(manifest, manifest.task("blue"))


def test_tasks_whose_routers_have_the_same_bytes_keep_their_own_experts(
    workshop: Workshop, make_engine: MakeEngine
) -> None:
    workshop.publish("red", "aaaa")
    workshop.publish("green", "1234")
    workshop.publish("blue", "? ! ?")
    manifest = workshop.repertoire.manifest()
    blue = manifest.tasks[-1].router
    narrow = blue.model_copy(update={"top_k": 1})
    turned = blue.model_copy(update={"visible": tuple(reversed(blue.visible))})
    tasks = [
        task.model_copy(update={"router": router})
        for task, router in zip(manifest.tasks, (narrow, turned, blue), strict=True)
    ]
    alike = manifest.model_copy(update={"generation": 4, "parent": 3, "tasks": tuple(tasks)})
    workshop.repertoire.publish(alike, {}, expected=3)
    engine = make_engine(workshop)
    answers = []
    for task in ("red", "green", "blue"):
        answer = ask(engine, "hello", task=task).wait()
        wanted = workshop.reference("hello", task, 8)
        torch.testing.assert_close(answer.logits(267), wanted, rtol=1e-4, atol=1e-4)
        answers.append(wanted[0])
    assert not torch.equal(answers[0], answers[2])
    assert not torch.equal(answers[1], answers[2])


def test_a_long_prompt_in_pieces_is_explained_like_one_in_a_single_piece(
    workshop: Workshop, make_engine: MakeEngine
) -> None:
    publish_kinds(workshop)
    whole, pieces = (
        ask(make_engine(workshop, max_step_tokens=size), "many words " * 4, task="blue", explain=True).wait()
        for size in (512, 7)
    )
    for one, other in zip(whole.finished.explanation, pieces.finished.explanation, strict=True):
        assert one.experts == pytest.approx(other.experts, abs=1e-4)


def test_a_prompt_is_located_where_experts_begin_in_the_first_layer(
    workshop: Workshop, make_engine: MakeEngine
) -> None:
    workshop.first_layer = 0
    publish_kinds(workshop, scope="request")
    engine = make_engine(workshop)
    for text, task in (("aaaa bbbb cccc", "red"), ("? ! ? ! ? ! ? !", "blue")):
        for wish in ({}, {"task": task}):
            answer = ask(engine, text, max_tokens=3, **wish).wait()
            assert answer.located.task == task
            expected = workshop.reference(text, task, 3)
            torch.testing.assert_close(answer.logits(workshop.base.info.vocab_size), expected, **TOLERANCE)
    assert [event.reason for event in ask(engine, "aaaa bbbb", locate_only=True).wait().events[1:]] == ["located"]
