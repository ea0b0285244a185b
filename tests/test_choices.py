"""Several answers of one prompt: it runs once, and each answer is what it would have been alone."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from engines import ask
from repertoires import Workshop

from runtime.engine.engine import Engine
from runtime.engine.request import Failed, Finished, Located, TokenDelta
from runtime.errors import BudgetError, CancelledError, InvalidInputError

MakeEngine = Callable[..., Engine]


def test_each_choice_is_what_its_seed_gives_alone(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(three_tasks)
    drawn = {"temperature": 1.0, "seed": 11}
    together = ask(engine, "hello", task="blue", keep_logits=False, sampling={**drawn, "n": 3}).wait()
    for choice in range(3):
        alone = ask(engine, "hello", task="blue", sampling={**drawn, "seed": 11 + choice}).wait()
        assert together.choice_tokens(choice) == alone.tokens
        assert together.choice_text(choice) == alone.text
    assert together.finished.reason == "length"
    assert together.finished.other_reasons == ("length", "length")


def test_the_prompt_is_located_and_runs_once(
    three_tasks: Workshop, make_engine: MakeEngine, prototypes: dict[str, str]
) -> None:
    engine = make_engine(three_tasks)
    ask(engine, prototypes["red"], max_tokens=1).wait()
    steps = engine.statistics().steps
    one = ask(engine, prototypes["red"], max_tokens=6).wait()
    for_one = engine.statistics().steps - steps
    four = ask(engine, prototypes["red"], max_tokens=6, keep_logits=False, sampling={"n": 4}).wait()
    assert engine.statistics().steps - steps == 2 * for_one, "four answers take as many steps as one"
    assert sum(isinstance(event, Located) for event in four.events) == 1
    assert four.finished.usage.prompt_tokens == one.finished.usage.prompt_tokens
    assert four.finished.usage.completion_tokens == 4 * 6
    assert [four.choice_tokens(choice) for choice in range(4)] == [one.tokens] * 4


def test_a_choice_that_ends_early_leaves_the_others_going(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(three_tasks)
    drawn = {"temperature": 1.5, "seed": 5, "n": 4}
    free = ask(engine, "hello", keep_logits=False, max_tokens=24, sampling=drawn).wait()
    stop = free.choice_text(2)[4:6]
    stopped = ask(engine, "hello", keep_logits=False, max_tokens=24, sampling={**drawn, "stop": (stop,)}).wait()
    reasons = (stopped.finished.reason, *stopped.finished.other_reasons)
    for choice, reason in enumerate(reasons):
        whole = free.choice_text(choice)
        assert stopped.choice_text(choice) == whole.split(stop)[0]
        assert reason == ("stop" if stop in whole else "length")
    assert reasons[2] == "stop"
    assert stopped.finished is stopped.events[-1], "nothing follows the end"


def test_choices_wait_until_all_of_them_fit(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(three_tasks, max_running=4)
    long = ask(engine, "hello", max_tokens=60)
    all_four = ask(engine, "hello", keep_logits=False, sampling={"n": 4})
    assert all_four.wait().finished.usage.completion_tokens == 32
    assert long.ended.is_set(), "four slots are free only when the first request has ended"


def test_cancelling_ends_all_choices_and_gives_everything_back(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(three_tasks)
    for _ in range(3):
        answer = ask(engine, "hello", max_tokens=200, keep_logits=False, sampling={"n": 5})
        assert answer.began.wait(60)
        engine.cancel(answer.request_id)
        assert isinstance(answer.wait().error, CancelledError)
        assert sum(isinstance(event, Finished | Failed) for event in answer.events) == 1
    assert engine.statistics().kv_bytes_reserved == 0


def test_a_caller_that_cancels_from_its_sink_ends_the_request_once(
    three_tasks: Workshop, make_engine: MakeEngine
) -> None:
    engine = make_engine(three_tasks)
    answer = ask(engine, "hello", max_tokens=3, keep_logits=False, sampling={"n": 2})
    seen = threading.Event()
    assert answer.wait().finished.usage.completion_tokens == 6
    engine.cancel(answer.request_id)
    ask(engine, "after").wait()
    seen.set()
    assert sum(isinstance(event, Finished | Failed) for event in answer.events) == 1
    assert {event.choice for event in answer.events if isinstance(event, TokenDelta)} == {0, 1}


def test_more_choices_than_can_ever_run_are_refused(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(three_tasks, max_running=2)
    with pytest.raises(InvalidInputError) as caught:
        ask(engine, "hello", keep_logits=False, sampling={"n": 3})
    assert caught.value.field == "n"
    one_token = engine._cache._token_bytes
    small = make_engine(three_tasks, kv_budget_bytes=one_token * 60)
    ask(small, "hello", max_tokens=8).wait()
    with pytest.raises(BudgetError):
        ask(small, "hello", max_tokens=8, keep_logits=False, sampling={"n": 4})


def test_log_probabilities_come_with_the_tokens_of_every_choice(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    answer = ask(make_engine(three_tasks), "hello", keep_logits=False, sampling={"n": 2, "logprobs": 2}).wait()
    deltas = [event for event in answer.events if isinstance(event, TokenDelta) and event.token_ids]
    assert len(deltas) == 16
    for delta in deltas:
        (logprob,) = delta.logprobs
        assert (logprob.chosen.token_id,) == delta.token_ids
        assert logprob.top[0] == logprob.chosen, "greedy takes the likeliest"
        assert logprob.top[0].logprob >= logprob.top[1].logprob
