"""What a request wants where no task is near enough, and whose turn it is in the queue."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engines import ask
from repertoires import Workshop

from runtime.engine.engine import Engine
from runtime.engine.request import Request
from runtime.errors import InvalidInputError, NoTaskNearError, UnknownTaskError

MakeEngine = Callable[..., Engine]


@pytest.fixture
def strict(workshop: Workshop) -> Workshop:
    """Two tasks: nothing is near enough to `red`, everything to `green` if it wins."""
    workshop.publish("red", "aaaa bbbb cccc", threshold=1e-9)
    workshop.publish("green", "12 34 56 78 90")
    return workshop


def test_the_default_task_answers_where_none_is_near(strict: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(strict)
    plain = ask(engine, "aaaa bbbb").wait()
    assert (plain.located.task, plain.located.how) == (None, "abstained")
    defaulted = ask(engine, "aaaa bbbb", default_task="green").wait()
    assert (defaulted.located.task, defaulted.located.how) == ("green", "defaulted")
    assert defaulted.located.scores == plain.located.scores
    assert defaulted.tokens == ask(engine, "aaaa bbbb", task="green").wait().tokens


def test_a_request_may_rather_fail(strict: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(strict)
    answer = ask(engine, "aaaa bbbb", abstain_fails=True).wait()
    assert isinstance(answer.error, NoTaskNearError)
    assert len(answer.events) == 1
    assert ask(engine, "12 34 56", abstain_fails=True).wait().located.how == "located"
    assert ask(engine, "aaaa bbbb", task="red", abstain_fails=True).wait().located.how == "pinned"
    assert ask(engine, "aaaa bbbb", base_only=True, abstain_fails=True).wait().located.how == "base"


def test_where_a_task_is_near_the_default_does_not_matter(strict: Workshop, make_engine: MakeEngine) -> None:
    located = ask(make_engine(strict), "12 34 56 78", default_task="red").wait().located
    assert (located.task, located.how) == ("green", "located")


def test_a_default_task_must_exist(strict: Workshop, make_engine: MakeEngine) -> None:
    with pytest.raises(UnknownTaskError):
        ask(make_engine(strict), "x", default_task="purple")


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("default_task", {"default_task": "red", "abstain_fails": True}),
        ("priority", {"priority": 101}),
        ("continuation", {"continuation": ""}),
    ],
)
def test_a_request_that_cannot_be_meant_is_refused_by_its_field(field: str, fields: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        Request(request_id="r", text="x", **fields)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_the_lowest_priority_number_goes_first(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(three_tasks, max_running=1, start=False)
    engine._refusing = None
    ends: list[int] = []
    answers = []
    for priority in (5, 0, -5, 5):
        answer = ask(engine, "hello", priority=priority, max_tokens=2)
        answer.on_end = lambda priority=priority: ends.append(priority)
        answers.append(answer)
    engine.start()
    for answer in answers:
        answer.wait()
    assert ends == [-5, 0, 5, 5]


def test_fair_serves_the_tenant_with_fewest_running_first(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(three_tasks, max_running=2, policy="fair", start=False)
    engine._refusing = None
    begins: list[str] = []
    answers = []
    for tenant, max_tokens in (("big", 60), ("big", 2), ("big", 2), ("small", 2)):
        answer = ask(engine, "hello", tenant=tenant, max_tokens=max_tokens)
        answer.on_begin = lambda tenant=tenant: begins.append(tenant)
        answers.append(answer)
    engine.start()
    for answer in answers:
        answer.wait()
    assert begins == ["big", "big", "small", "big"]
