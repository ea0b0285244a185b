"""The prefix cache: a hit answers as a miss would, nothing is shared that differs, and bytes stay within the budget."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engines import Answer, ask
from repertoires import Workshop

from runtime.engine.engine import Engine
from runtime.engine.prefix import BLOCK
from runtime.model.generation import open_generation

MakeEngine = Callable[..., Engine]
SHARED = "these are instructions that many prompts begin with, long enough for some blocks: "


def logits(answer: Answer, workshop: Workshop) -> torch.Tensor:
    return answer.wait().logits(workshop.base.info.vocab_size)


def saved(engine: Engine) -> tuple[int, int]:
    statistics = engine.statistics()
    return statistics.prefix_base_tokens, statistics.prefix_adapted_tokens


@pytest.mark.parametrize("task", [None, "red", "blue"])
@pytest.mark.parametrize("max_step_tokens", [9, 512])
def test_a_hit_answers_as_a_miss(
    three_tasks: Workshop, make_engine: MakeEngine, task: str | None, max_step_tokens: int
) -> None:
    engine = make_engine(three_tasks, max_step_tokens=max_step_tokens)
    without = make_engine(three_tasks, prefix_budget_bytes=0)
    fields = {"task": task, "base_only": task is None}
    ask(engine, SHARED + "first", **fields).wait()
    assert saved(engine) == (0, 0)
    for text in (SHARED + "second", SHARED + "first", SHARED):
        before = saved(engine)
        hit, miss = ask(engine, text, **fields), ask(without, text, **fields)
        torch.testing.assert_close(logits(hit, three_tasks), logits(miss, three_tasks), rtol=1e-4, atol=1e-4)
        assert hit.tokens == miss.tokens
        length = len(SHARED) // BLOCK * BLOCK
        assert all(now - then >= length - BLOCK for now, then in zip(saved(engine), before, strict=True))
    assert engine.statistics().prefix_hits == 3
    assert without.statistics().prefix_bytes == 0


def test_a_located_prompt_is_located_alike_with_a_hit(
    three_tasks: Workshop, make_engine: MakeEngine, prototypes: dict[str, str]
) -> None:
    engine = make_engine(three_tasks)
    for text in prototypes.values():
        first, second = ask(engine, text * 3).wait(), ask(engine, text * 3).wait()
        assert second.located.task == first.located.task
        assert second.located.scores == first.located.scores
        assert second.tokens == first.tokens
    assert engine.statistics().prefix_hits == 3


def test_what_lies_below_the_experts_is_shared_by_all_and_the_rest_by_nobody_else(
    three_tasks: Workshop, make_engine: MakeEngine
) -> None:
    engine = make_engine(three_tasks)
    ask(engine, SHARED, task="red").wait()
    for fields in ({"task": "green"}, {"task": "blue"}, {"base_only": True}):
        base, adapted = saved(engine)
        answer = ask(engine, SHARED, **fields)
        expected = three_tasks.reference(SHARED, fields.get("task"), 8)
        torch.testing.assert_close(logits(answer, three_tasks), expected, rtol=1e-4, atol=1e-4)
        now = saved(engine)
        assert now[0] > base
        assert now[1] == adapted


def test_adapters_of_one_name_and_different_weights_never_share(
    workshop: Workshop, make_engine: MakeEngine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    workshop.publish("red", "aaaa bbbb cccc")
    engine = make_engine(workshop, 1)
    ask(engine, SHARED, task="red").wait()
    other = Workshop(workshop.base, type(workshop.repertoire)(tmp_path_factory.mktemp("other")))
    other.publish("green", "12 34 56")
    second = other.publish("red", "aaaa bbbb cccc", rank=2)
    held = workshop.repertoire.manifest(1)
    own = second.tasks[1]
    entry = second.expert_set(own.experts)
    visible = second.expert_set(second.tasks[0].experts)
    replaced = held.model_copy(
        update={"generation": 2, "parent": 1, "experts": (visible, entry), "tasks": (second.tasks[0], own)}
    )
    workshop.repertoire.publish(replaced, other.blobs, expected=1)
    engine.publish(open_generation(workshop.repertoire, 2))
    before = saved(engine)
    answer = ask(engine, SHARED, task="red")
    fresh = make_engine(workshop, 2, prefix_budget_bytes=0)
    torch.testing.assert_close(
        logits(answer, workshop), logits(ask(fresh, SHARED, task="red"), workshop), rtol=1e-4, atol=1e-4
    )
    base, adapted = saved(engine)
    assert base > before[0], "below the experts nothing has changed"
    assert adapted == before[1], "the same name, other weights"
    assert answer.located.generation == 2


def test_bytes_stay_within_the_budget_and_the_least_recently_used_go_first(
    three_tasks: Workshop, make_engine: MakeEngine
) -> None:
    engine = make_engine(three_tasks)
    ask(engine, "a" * 100, task="red").wait()
    one_prompt = engine.statistics().prefix_bytes
    small = make_engine(three_tasks, prefix_budget_bytes=2 * one_prompt)
    for letter in "abc":
        ask(small, letter * 100, task="red").wait()
        assert small.statistics().prefix_bytes <= 2 * one_prompt
    hits = small.statistics().prefix_hits
    ask(small, "c" * 100, task="red").wait()
    assert small.statistics().prefix_hits == hits + 1
    whole = saved(small)
    ask(small, "a" * 100, task="red").wait()
    assert saved(small)[1] - whole[1] == 0, "the oldest has gone"


def test_scores_choices_and_explanations_are_the_same_with_a_hit(
    three_tasks: Workshop, make_engine: MakeEngine
) -> None:
    engine = make_engine(three_tasks)

    def asked() -> tuple[list[float], list[list[int]], list[float]]:
        scored = ask(engine, SHARED, task="blue", continuation=" and so on", keep_logits=False).wait()
        choices = ask(
            engine, SHARED, task="blue", keep_logits=False, sampling={"n": 3, "temperature": 1.0, "seed": 3}
        ).wait()
        explained = ask(engine, SHARED, task="blue", explain=True).wait()
        weights = [weight for layer in explained.finished.explanation for weight in layer.experts.values()]
        tokens = [choices.choice_tokens(choice) for choice in range(3)]
        return [item.logprob for item in scored.finished.scored], tokens, weights

    first, second = asked(), asked()
    assert second[0] == pytest.approx(first[0], abs=1e-4)
    assert second[1] == first[1]
    assert second[2] == pytest.approx(first[2], abs=1e-4)
    assert saved(engine)[1] > 0


def test_a_request_that_shares_nothing_neither_takes_nor_leaves_a_beginning(
    three_tasks: Workshop, make_engine: MakeEngine
) -> None:
    engine = make_engine(three_tasks)
    ask(engine, SHARED, task="red", share_prefix=False).wait()
    assert engine.statistics().prefix_bytes == 0
    ask(engine, SHARED, task="red").wait()
    assert engine.statistics().prefix_bytes > 0
    ask(engine, SHARED, task="red", share_prefix=False).wait()
    assert engine.statistics().prefix_hits == 0


def test_a_request_that_is_cut_leaves_the_cache_whole(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(three_tasks, max_step_tokens=5)
    for _ in range(4):
        answer = ask(engine, SHARED, max_tokens=100)
        engine.cancel(answer.request_id)
        answer.wait()
    assert ask(engine, SHARED).wait().tokens == ask(make_engine(three_tasks), SHARED).wait().tokens
