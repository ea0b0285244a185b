"""Constrained output: an answer is JSON of its schema or matches its expression, whatever the model prefers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
import torch
from engines import ask
from repertoires import Workshop

from runtime.engine.engine import Engine
from runtime.engine.grammar import MAX_CACHED, Grammars
from runtime.engine.request import SamplingParams
from runtime.errors import InvalidInputError
from runtime.model.base import BaseModel

MakeEngine = Callable[..., Engine]
SCHEMA = {
    "type": "object",
    "properties": {
        "item": {"enum": ["apple", "pear"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 99},
        "gift": {"type": "boolean"},
    },
    "required": ["item", "count", "gift"],
    "additionalProperties": False,
}


@pytest.fixture
def grammars(tiny_base: BaseModel) -> Grammars:
    return Grammars(tiny_base.tokenizer, vocab_size=tiny_base.info.vocab_size, eos_token_ids=tiny_base.eos_token_ids)


def constrained(engine: Engine, text: str = "an order", **options: object) -> tuple[str, str]:
    answer = ask(engine, text, max_tokens=80, keep_logits=False, sampling={"ignore_eos": False, **options}).wait()
    return answer.text, answer.finished.reason


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_an_answer_is_json_of_its_schema(three_tasks: Workshop, make_engine: MakeEngine, temperature: float) -> None:
    engine = make_engine(three_tasks)
    for seed in range(3):
        text, reason = constrained(engine, json_schema=json.dumps(SCHEMA), temperature=temperature, seed=seed)
        order = json.loads(text)
        assert order.keys() == {"item", "count", "gift"}
        assert order["item"] in {"apple", "pear"}
        assert 1 <= order["count"] <= 99
        assert isinstance(order["gift"], bool)
        assert reason == "stop"


@pytest.mark.parametrize("regex", [r"[0-9]{4}-[0-9]{2}-[0-9]{2}", r"(yes|no)", r"\$ [1-9][0-9]{0,5}\.[0-9]{2}"])
def test_an_answer_matches_its_expression(three_tasks: Workshop, make_engine: MakeEngine, regex: str) -> None:
    engine = make_engine(three_tasks)
    for temperature in (0.0, 1.5):
        text, reason = constrained(engine, regex=regex, temperature=temperature, seed=1)
        assert re.fullmatch(regex, text)
        assert reason == "stop"


def test_free_and_constrained_answers_share_a_batch(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(three_tasks)
    alone = ask(engine, "hello", max_tokens=20).wait().tokens
    answers = [
        ask(engine, "hello", max_tokens=20),
        ask(engine, "hello", keep_logits=False, max_tokens=20, sampling={"regex": "[0-9]{5}", "ignore_eos": False}),
        ask(engine, "hello", max_tokens=20),
    ]
    free, digits, other = (answer.wait() for answer in answers)
    assert free.tokens == other.tokens == alone
    assert re.fullmatch("[0-9]{5}", digits.text)


def test_every_choice_follows_the_constraint_by_itself(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    sampling = {"n": 4, "regex": "[a-z]{3,6}", "temperature": 2.0, "seed": 1, "ignore_eos": False}
    answer = ask(make_engine(three_tasks), "hello", keep_logits=False, max_tokens=20, sampling=sampling).wait()
    texts = [answer.choice_text(choice) for choice in range(4)]
    assert all(re.fullmatch("[a-z]{3,6}", text) for text in texts)
    assert len(set(texts)) > 1


BAD = [
    ("json_schema", '{"type": "strin"}'),
    ("json_schema", '{"type":'),
    ("json_schema", "[1]"),
    ("json_schema", "false"),
    ("json_schema", '{"$ref": "http://example.org/schema"}'),
    ("json_schema", '{"$ref": "file:///etc/passwd"}'),
    ("json_schema", '{"type": "string", "pattern": "("}'),
    ("regex", "("),
    ("regex", "(?=a)b"),
]


@pytest.mark.parametrize(("field", "text"), BAD)
def test_a_constraint_that_cannot_be_followed_is_refused_by_its_field(
    grammars: Grammars, field: str, text: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        grammars.matcher(SamplingParams(**{field: text}))  # type: ignore[arg-type]
    assert caught.value.field == field


def test_a_bad_constraint_is_refused_on_arrival(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(three_tasks)
    with pytest.raises(InvalidInputError, match="json_schema"):
        constrained(engine, json_schema='{"type": "strin"}')
    assert constrained(engine, regex="ok")[0] == "ok", "the engine lives on"


def test_what_was_compiled_is_kept_up_to_a_bound_and_each_answer_begins_anew(grammars: Grammars) -> None:
    first = grammars.matcher(SamplingParams(regex="ab"))
    assert first is not None
    scores = torch.zeros(267)
    first.mask(scores)
    (a,) = (scores == 0).nonzero()[:1].flatten().tolist()
    first.advance(a)
    second = grammars.matcher(SamplingParams(regex="ab"))
    assert second is not None
    again = torch.zeros(267)
    second.mask(again)
    assert torch.equal(scores, again), "a used matcher leaves the kept one as it was"
    for i in range(MAX_CACHED + 5):
        grammars.matcher(SamplingParams(regex=f"x{i}"))
    assert len(grammars._compiled) == MAX_CACHED
    assert ("regex", f"x{MAX_CACHED + 4}") in grammars._compiled


def test_an_answer_without_constraint_has_no_matcher(grammars: Grammars) -> None:
    assert grammars.matcher(SamplingParams()) is None
