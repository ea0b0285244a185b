"""Scoring: the log-probabilities of a given answer are those of the model that would have answered."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engines import Answer, ask
from repertoires import Workshop

from runtime.engine.engine import Engine
from runtime.errors import InvalidInputError
from runtime.model.attach import attached, load_mixture
from runtime.model.generation import open_generation

MakeEngine = Callable[..., Engine]
CONTINUATION = " an answer of some length, to be scored as a whole"


def score(engine: Engine, text: str, continuation: str, **fields: object) -> Answer:
    return ask(engine, text, continuation=continuation, keep_logits=False, **fields)


def reference(workshop: Workshop, text: str, continuation: str, task: str | None) -> list[float]:
    """Of the attached Hugging Face model, one forward pass over everything."""
    generation = open_generation(workshop.repertoire)
    context = generation.template.encode(workshop.base.tokenizer, text)
    given = generation.template.encode_part(workshop.base.tokenizer, continuation, plain=True)
    ffns = {} if task is None else load_mixture(workshop.repertoire, generation, task, workshop.base.model)
    with attached(workshop.base.model, ffns), torch.no_grad():
        logits = workshop.base.model(torch.tensor([context + given]), use_cache=False).logits[0]
    rows = torch.log_softmax(logits[len(context) - 1 : -1], dim=1)
    return rows[torch.arange(len(given)), torch.tensor(given)].tolist()


@pytest.mark.parametrize("task", [None, "red", "blue"])
@pytest.mark.parametrize("max_step_tokens", [7, 512])
def test_scores_equal_the_attached_hugging_face_model(
    three_tasks: Workshop, make_engine: MakeEngine, task: str | None, max_step_tokens: int
) -> None:
    engine = make_engine(three_tasks, max_step_tokens=max_step_tokens)
    answer = score(engine, "hello there", CONTINUATION, task=task, base_only=task is None).wait()
    scored = answer.finished.scored
    assert [item.logprob for item in scored] == pytest.approx(
        reference(three_tasks, "hello there", CONTINUATION, task), abs=1e-3
    )
    assert "".join(item.text for item in scored) == CONTINUATION
    assert (answer.finished.reason, answer.tokens) == ("scored", [])
    assert engine.statistics().tokens == 0


def test_an_answer_scores_as_it_was_generated(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(three_tasks)
    # Capitals are one token each, so the answer is tokenised as it was generated.
    sampling = {"logprobs": 0, "regex": "[A-Z]{12}", "ignore_eos": False}
    said = ask(engine, "hello", task="green", max_tokens=20, keep_logits=False, sampling=sampling).wait()
    logprobs = [logprob.chosen for event in said.events for logprob in getattr(event, "logprobs", ())]
    assert len(said.text) == 12
    scored = score(engine, "hello", said.text, task="green").wait().finished.scored
    assert [item.logprob for item in scored] == pytest.approx([item.logprob for item in logprobs[:12]], abs=1e-3)


def test_the_answer_does_not_change_where_the_prompt_is_located(
    three_tasks: Workshop, make_engine: MakeEngine, prototypes: dict[str, str]
) -> None:
    engine = make_engine(three_tasks)
    for task, text in prototypes.items():
        alone = ask(engine, text).wait().located
        scored = score(engine, text, CONTINUATION * 4).wait()
        assert (scored.located.task, scored.located.how) == (task, "located")
        assert [item.score for item in scored.located.scores] == pytest.approx(
            [item.score for item in alone.scores], rel=1e-4
        )


def test_scores_among_decoding_neighbours_are_those_alone(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(three_tasks)
    alone = [item.logprob for item in score(engine, "hello", CONTINUATION, task="red").wait().finished.scored]
    neighbours = [ask(engine, "hello", task=task, max_tokens=40) for task in ("red", "blue")]
    together = [score(engine, "hello", CONTINUATION, task="red") for _ in range(3)]
    for answer in together:
        assert [item.logprob for item in answer.wait().finished.scored] == pytest.approx(alone, abs=1e-4)
    for neighbour in neighbours:
        assert len(neighbour.wait().tokens) == 40


def test_a_score_may_fill_the_context_and_no_more(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(three_tasks, max_context=64)
    room = 64 - ask(engine, "x", max_tokens=1).wait().finished.usage.prompt_tokens
    assert len(score(engine, "x", "!" * room).wait().finished.scored) == room
    with pytest.raises(InvalidInputError):
        score(engine, "x", "!" * (room + 1))


def test_a_score_explains_itself_by_the_tokens_before_each_scored_one(
    three_tasks: Workshop, make_engine: MakeEngine
) -> None:
    engine = make_engine(three_tasks, max_step_tokens=7)
    explained = score(engine, "hello", CONTINUATION, task="blue", explain=True).wait().finished.explanation
    assert [item.layer for item in explained] == [2, 3]
    assert all(sum(item.experts.values()) == pytest.approx(1.0, abs=1e-4) for item in explained)
