"""Drafts by n-gram lookup: answers are those without drafts, fewer steps are taken, and what held is counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engines import ask
from native import NativeClass
from repertoires import Workshop

from runtime.engine.drafting import STEP_TOKENS, NGrams
from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.errors import InvalidInputError

MakeEngine = Callable[..., Engine]
PROMPT = "abc abc abc abc "


def test_what_followed_the_longest_ngram_last_is_proposed() -> None:
    text = NGrams([1, 2, 3, 4, 1, 2, 3, 5, 9, 2, 3, 6, 1, 2, 3])
    assert text.propose(3) == [5, 9, 2]
    assert text.propose(1) == [5]


def test_a_shorter_ngram_serves_where_the_longest_is_new() -> None:
    assert NGrams([7, 2, 3, 8, 0, 2, 3]).propose(2) == [8, 0]


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3, 4, 5]])
def test_nothing_is_proposed_where_nothing_repeats(tokens: list[int]) -> None:
    assert NGrams(tokens).propose(4) == []


def test_a_text_grows() -> None:
    text = NGrams([1, 2, 3])
    text.extend([4, 1, 2])
    assert (text.propose(4), len(text)) == ([3, 4, 1, 2], 6)


@pytest.mark.parametrize("native", [True, False])
def test_answers_with_drafts_are_those_without(
    workshop: Workshop, make_engine: MakeEngine, native_class: NativeClass, *, native: bool
) -> None:
    workshop.publish("red", "aaaa bbbb")
    options = {"model_class": native_class("float32")} if native else {}
    plain, drafting = (make_engine(workshop, max_draft=length, **options) for length in (0, 6))
    wishes = [(PROMPT, "red"), (PROMPT, None), ("xyz", "red")]
    for prompt, task in wishes:
        first, second = (
            ask(engine, prompt, task=task, base_only=task is None, max_tokens=40).wait() for engine in (plain, drafting)
        )
        assert second.tokens == first.tokens
        size = workshop.base.info.vocab_size
        torch.testing.assert_close(second.logits(size), first.logits(size), atol=1e-4, rtol=1e-4)
    before, after = plain.statistics(), drafting.statistics()
    assert before.tokens == after.tokens == 120
    assert 0 < after.accepted_tokens <= after.drafted_tokens
    assert after.steps < before.steps
    assert before.drafted_tokens == 0


def test_a_full_batch_drafts_no_more_than_a_small_step_holds(workshop: Workshop, make_engine: MakeEngine) -> None:
    workshop.publish("red", "aaaa bbbb")
    engine = make_engine(workshop, max_draft=6)
    answers = [ask(engine, PROMPT, task="red", max_tokens=20) for _ in range(STEP_TOKENS)]
    alone = ask(make_engine(workshop), PROMPT, task="red", max_tokens=20).wait()
    assert [answer.wait().tokens for answer in answers] == [alone.tokens] * STEP_TOKENS


def test_answers_that_are_drawn_are_not_drafted_for(workshop: Workshop, make_engine: MakeEngine) -> None:
    workshop.publish("red", "aaaa bbbb")
    engine = make_engine(workshop, max_draft=6)
    ask(engine, PROMPT, task="red", max_tokens=20, sampling={"temperature": 0.1, "seed": 1}).wait()
    assert engine.statistics().drafted_tokens == 0


@pytest.mark.parametrize(
    "sampling",
    [
        {"regex": "[ab ]{30}", "ignore_eos": False},
        {"json_schema": '{"type": "array", "items": {"enum": [1]}, "minItems": 8}', "ignore_eos": False},
        {"repetition_penalty": 1.2},
        {"presence_penalty": 0.5},
        {"frequency_penalty": -0.5},
        {"logprobs": 2},
        {"logprobs": 0, "regex": "(ab )+", "presence_penalty": 0.1, "ignore_eos": False},
    ],
)
def test_answers_with_options_are_not_drafted_for_and_others_of_their_batch_still_are(
    workshop: Workshop, make_engine: MakeEngine, sampling: dict[str, object]
) -> None:
    workshop.publish("red", "aaaa bbbb")
    plain, drafting = (make_engine(workshop, max_draft=length) for length in (0, 6))
    fields: dict[str, object] = {"task": "red", "max_tokens": 30, "keep_logits": False}
    alone = ask(drafting, PROMPT, sampling=sampling, **fields).wait()
    assert drafting.statistics().drafted_tokens == 0
    expected = [ask(plain, PROMPT, sampling=wish, **fields).wait() for wish in (sampling, {})]
    assert alone.tokens == expected[0].tokens
    with drafting.together():
        answers = [ask(drafting, PROMPT, sampling=wish, **fields) for wish in (sampling, {})]
    assert [answer.wait().tokens for answer in answers] == [answer.tokens for answer in expected]
    assert answers[0].finished.reason == expected[0].finished.reason
    assert drafting.statistics().accepted_tokens > 0


def test_a_negative_draft_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="max_draft"):
        EngineOptions(max_draft=-1)
