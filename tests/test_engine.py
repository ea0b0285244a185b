"""The engine on the tiny base: right answers, alone and together, and an end for every request."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from engines import Answer, ask, until
from repertoires import Workshop

from runtime.engine.engine import Engine
from runtime.errors import (
    BudgetError,
    CancelledError,
    DeadlineError,
    GreenroomError,
    InvalidInputError,
    QueueFullError,
    UnavailableError,
    UnknownTaskError,
)
from runtime.model.generation import open_generation

MakeEngine = Callable[..., Engine]
TASKS = ("red", "green", "blue")


def logits(answer: Answer, workshop: Workshop) -> torch.Tensor:
    return answer.wait().logits(workshop.base.info.vocab_size)


@pytest.mark.parametrize("task", [None, *TASKS])
def test_an_answer_equals_the_attached_hugging_face_model(
    three_tasks: Workshop, make_engine: MakeEngine, task: str | None
) -> None:
    engine = make_engine(three_tasks)
    answer = ask(engine, "hello there", task=task, base_only=task is None)
    expected = three_tasks.reference("hello there", task, 8)
    torch.testing.assert_close(logits(answer, three_tasks), expected, rtol=1e-4, atol=1e-4)
    assert answer.tokens == expected.argmax(1).tolist()


def test_a_mixed_batch_answers_as_each_prompt_alone(
    three_tasks: Workshop, make_engine: MakeEngine, prototypes: dict[str, str]
) -> None:
    engine = make_engine(three_tasks)
    jobs = [(text + "x" * i, task) for i in range(3) for task, text in prototypes.items()]
    together = [ask(engine, text, task=task, max_tokens=5 + i) for i, (text, task) in enumerate(jobs)]
    together.append(ask(engine, "plain", base_only=True))
    mixed = [logits(answer, three_tasks) for answer in together]
    for i, (text, task) in enumerate(jobs):
        alone = logits(ask(engine, text, task=task, max_tokens=5 + i), three_tasks)
        torch.testing.assert_close(mixed[i], alone, rtol=1e-4, atol=1e-4)
        assert together[i].tokens == alone.argmax(1).tolist()
    assert engine.statistics().running == 0


def test_prompts_are_located_and_the_answer_says_where_the_experts_came_from(
    three_tasks: Workshop, make_engine: MakeEngine, prototypes: dict[str, str]
) -> None:
    engine = make_engine(three_tasks)
    for task, text in prototypes.items():
        located = ask(engine, text).wait().located
        assert (located.task, located.how) == (task, "located")
        assert located.scores[0].task == task
        assert located.margin == pytest.approx(located.scores[1].score - located.scores[0].score)
        assert {use.task for use in located.experts} == set(TASKS[: TASKS.index(task) + 1]), "the visible set"
        new = [use.task for use in located.experts if use.source == "disk"]
        assert new == [task], "older experts are resident already"
    assert ask(engine, prototypes["blue"]).wait().located.experts[0].source == "host"


def test_a_guess_on_arrival_starts_the_reads_and_counts_as_useful(
    three_tasks: Workshop, make_engine: MakeEngine, prototypes: dict[str, str]
) -> None:
    engine = make_engine(three_tasks)
    visible = engine.visible.of(engine.generation, "blue")
    with engine.together():  # so small a base has located before anybody could guess
        answer = ask(engine, prototypes["blue"])
        until(lambda: engine.memory.missing_bytes(visible) == 0)
    located = answer.wait().located
    assert {use.source for use in located.experts} == {"disk"}, "read for this request, if before it was located"
    memory = engine.statistics().memory
    assert memory.prefetch_useful_bytes == memory.bytes_read > sum(use.bytes_read for use in located.experts) > 0
    assert memory.prefetch_wasted_bytes == 0
    without = make_engine(three_tasks, prefetch=False)
    ask(without, prototypes["blue"]).wait()
    assert without.statistics().memory.prefetch_useful_bytes == 0


def test_an_engine_that_has_just_begun_locates_as_one_that_has_read_everything(
    three_tasks: Workshop, make_engine: MakeEngine, prototypes: dict[str, str]
) -> None:
    engine = make_engine(three_tasks, start=False, generation=open_generation(three_tasks.repertoire, routers=False))
    assert not engine.generation.densities.are_read
    engine.start()
    answers = {task: ask(engine, text) for task, text in prototypes.items()}
    assert {task: answer.wait().located.task for task, answer in answers.items()} == {t: t for t in prototypes}


def test_a_wrong_guess_changes_no_answer_and_is_given_up(workshop: Workshop, make_engine: MakeEngine) -> None:
    workshop.publish("red", "aaaa bbbb cccc")
    workshop.publish("green", "12 34 56 78 90")
    manifest = workshop.repertoire.manifest()
    red, green = manifest.tasks
    swapped = (
        red.model_copy(update={"arrival": green.arrival}),
        green.model_copy(update={"arrival": red.arrival}),
    )
    wrong = manifest.model_copy(update={"generation": 3, "parent": 2, "tasks": swapped})
    workshop.repertoire.publish(wrong, {}, expected=2)
    engine = make_engine(workshop)
    answer = ask(engine, "12 34 56 78 90")
    torch.testing.assert_close(
        logits(answer, workshop), workshop.reference("12 34 56 78 90", "green", 8), rtol=1e-4, atol=1e-4
    )
    assert answer.located.task == "green"


def test_a_prompt_of_no_task_goes_to_the_plain_base_model(workshop: Workshop, make_engine: MakeEngine) -> None:
    workshop.publish("red", "aaaa bbbb cccc", threshold=1e-6)
    answer = ask(make_engine(workshop), "something else")
    torch.testing.assert_close(
        logits(answer, workshop), workshop.reference("something else", None, 8), rtol=1e-4, atol=1e-4
    )
    assert (answer.located.task, answer.located.how) == (None, "abstained")
    assert answer.located.experts == ()


def test_adding_a_task_leaves_the_answers_of_older_tasks_bit_identical(
    workshop: Workshop, make_engine: MakeEngine
) -> None:
    workshop.publish("red", "aaaa bbbb cccc")
    workshop.publish("green", "12 34 56 78 90")
    before = make_engine(workshop)
    workshop.publish("blue", "? ! ? !")
    after = make_engine(workshop)
    assert after.statistics().generation == 3
    for task in ("red", "green"):
        first, second = (logits(ask(engine, "same prompt", task=task), workshop) for engine in (before, after))
        assert torch.equal(first, second)


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_a_prompt_in_chunks_answers_as_a_whole_one(three_tasks: Workshop, make_engine: MakeEngine, chunk: int) -> None:
    text = "a rather long prompt that needs several steps"
    whole = logits(ask(make_engine(three_tasks), text, task="blue"), three_tasks)
    parts = logits(ask(make_engine(three_tasks, max_step_tokens=chunk), text, task="blue"), three_tasks)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


def test_requests_join_and_leave_a_running_batch_under_tight_budgets(
    three_tasks: Workshop, make_engine: MakeEngine, prototypes: dict[str, str]
) -> None:
    sets = [entry.units for entry in three_tasks.repertoire.manifest().experts]
    routers = sum(len(units) for units in sets) * 64 * 4
    all_bytes = sum(unit.bytes for units in sets for unit in units) + routers
    engine = make_engine(three_tasks, max_running=3, expert_budget_bytes=all_bytes, max_step_tokens=16)
    answers = [ask(engine, prototypes[TASKS[i % 3]], max_tokens=1 + i % 7) for i in range(24)]
    for i, answer in enumerate(answers):
        assert answer.wait().error is None
        assert len(answer.tokens) == 1 + i % 7
    engine.check_integrity()


def test_sets_that_do_not_fit_together_take_turns_and_are_evicted(workshop: Workshop, make_engine: MakeEngine) -> None:
    workshop.publish("red", "aaaa bbbb cccc", rank=8)
    entry = workshop.repertoire.manifest().experts[0]
    workshop.publish("green", "12 34 56 78 90", rank=2)
    both = sum(unit.bytes for e in workshop.repertoire.manifest().experts for unit in e.units)
    engine = make_engine(workshop, expert_budget_bytes=both - 1)
    with_green = ask(engine, "12 34 56 78 90", task="green")
    assert isinstance(with_green.wait().error, BudgetError), "green sees both sets, which exceed the budget"
    assert ask(engine, "x", task="red").wait().error is None
    routers = len(entry.units) * 64 * 4
    assert engine.statistics().memory.resident_bytes == sum(unit.bytes for unit in entry.units) + routers


def test_a_request_can_be_cancelled_while_it_streams(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(three_tasks)
    answer = ask(engine, "go on", task="red", max_tokens=200)
    assert answer.began.wait(30)
    engine.cancel(answer.request_id)
    assert isinstance(answer.wait().error, CancelledError)
    assert len(answer.tokens) < 200
    engine.cancel(answer.request_id)
    assert ask(engine, "go on", task="red").wait().error is None
    engine.check_integrity()


def test_a_deadline_ends_a_request_before_and_during_its_run(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(three_tasks)
    with pytest.raises(DeadlineError):
        ask(engine, "late", deadline=time.monotonic())
    waiting = make_engine(three_tasks, start=False)
    waiting.start()
    answer = ask(waiting, "slow", task="red", max_tokens=230, deadline=time.monotonic() + 0.05)
    assert isinstance(answer.wait().error, DeadlineError)


def test_bad_requests_are_refused_with_the_field_and_value(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(three_tasks)
    with pytest.raises(UnknownTaskError, match="'purple': generation 3 holds"):
        ask(engine, "x", task="purple")
    with pytest.raises(InvalidInputError, match="text='': must not be empty"):
        ask(engine, "")
    with pytest.raises(InvalidInputError, match="prompt tokens; the context of 256 must leave one"):
        ask(engine, "x" * 300)
    with pytest.raises(InvalidInputError, match="task='red': cannot be pinned together with base_only"):
        ask(engine, "x", task="red", base_only=True)


def test_the_answer_is_clipped_to_the_context(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    answer = ask(make_engine(three_tasks), "x" * 200, task="red", max_tokens=10_000).wait()
    assert answer.finished.reason == "length"
    assert answer.finished.usage.prompt_tokens + len(answer.tokens) == 256


def test_a_kv_budget_too_small_for_a_request_refuses_it_and_others_run(
    three_tasks: Workshop, make_engine: MakeEngine
) -> None:
    engine = make_engine(three_tasks, kv_budget_bytes=40 * 2 * 4 * 2 * 16 * 4)
    with pytest.raises(BudgetError, match="KV cache"):
        ask(engine, "x", task="red", max_tokens=100)
    assert ask(engine, "x", task="red", max_tokens=3).wait().error is None


def test_a_full_queue_refuses_and_a_closed_engine_fails_what_is_left(
    three_tasks: Workshop, make_engine: MakeEngine
) -> None:
    engine = make_engine(three_tasks, max_running=1, max_waiting=1)
    first, second = (ask(engine, "x", task="red", max_tokens=200) for _ in range(2))
    with pytest.raises(QueueFullError, match="2 requests are in flight"):
        ask(engine, "x")
    engine.close()
    assert isinstance(first.wait().error, UnavailableError)
    assert isinstance(second.wait().error, UnavailableError)
    with pytest.raises(UnavailableError):
        ask(engine, "x")


def test_draining_finishes_what_runs_and_refuses_what_comes(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(three_tasks)
    answer = ask(engine, "x", task="red", max_tokens=30)
    engine.drain(30)
    assert answer.wait().finished.reason == "length"
    with pytest.raises(UnavailableError, match="draining"):
        ask(engine, "x")


def test_a_defect_in_a_step_fails_its_requests_and_the_engine_lives_on(
    three_tasks: Workshop, make_engine: MakeEngine
) -> None:
    engine = make_engine(three_tasks)
    broken = ask(engine, "x", task="red", max_tokens=200)
    assert broken.began.wait(30)

    class Bomb:
        keys = property(lambda _self: (_ for _ in ()).throw(RuntimeError("bang")))

    cache, engine._runner._cache = engine._runner._cache, Bomb()  # type: ignore[assignment]
    assert type(broken.wait().error) is GreenroomError
    engine._runner._cache = cache
    assert ask(engine, "x", task="red").wait().error is None


def test_sampling_is_repeatable_by_seed_and_does_not_depend_on_the_batch(
    three_tasks: Workshop, make_engine: MakeEngine
) -> None:
    engine = make_engine(three_tasks)
    hot = {"temperature": 1.5, "top_p": 0.9, "top_k": 50}
    alone = ask(engine, "draw", task="red", max_tokens=20, sampling={**hot, "seed": 7}).wait()
    crowd = [ask(engine, "draw", task="red", max_tokens=20, sampling={**hot, "seed": seed}) for seed in (7, 8, 9)]
    drawn = [answer.wait().tokens for answer in crowd]
    assert drawn[0] == alone.tokens
    assert drawn[1] != drawn[2]


def test_an_answer_ends_at_a_stop_string_and_does_not_show_it(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(three_tasks)
    whole = ask(engine, "x", task="red", max_tokens=40).wait().text
    stop = whole[10:13]
    cut = ask(engine, "x", task="red", max_tokens=40, sampling={"stop": (stop,)}).wait()
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finished.reason == "stop"


def test_the_end_token_ends_an_answer(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(three_tasks)
    tokens = ask(engine, "x", task="red", max_tokens=30).wait().tokens
    engine._speaking._eos_token_ids = (tokens[4],)
    ended = ask(engine, "x", task="red", max_tokens=30, sampling={"ignore_eos": False}).wait()
    assert ended.tokens == tokens[: tokens.index(tokens[4]) + 1]
    assert ended.finished.reason == "stop"


def test_locating_alone_loads_no_expert(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(three_tasks)
    answer = ask(engine, "12 34 56 78 90", locate_only=True).wait()
    assert answer.located.task == "green"
    assert answer.finished.reason == "located"
    assert engine.statistics().memory.loads == 0
