"""The OpenAI-compatible HTTP front end, asked by the real `openai` client.

It does not know models: the engine plays a script.
Read first: what no real client would send is in `test_http.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from scripted_engine import DIGEST, ScriptedEngine
from serving import Serving

from runtime import errors
from runtime.service.guard import Guard
from runtime.service.tokens import TenantLimits, TokenEntry, Tokens, digest_of, new_secret

SECRET = new_secret()
REFUSALS: dict[str, Exception] = {
    "task": errors.UnknownTaskError("no task of this name"),
    "input": errors.InvalidInputError("input", "x", "9 prompt tokens too many"),
    "digest": errors.DigestMismatchError("/srv/blob"),
    "full": errors.QueueFullError("full"),
    "budget": errors.BudgetError("too small"),
    "older": errors.GenerationMismatchError("older"),
    "draining": errors.UnavailableError("draining"),
    "late": errors.DeadlineError("too late"),
    "bug": ZeroDivisionError("/secret/path"),
}


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[ScriptedEngine, Serving]]:
    """One server for all tests of this file."""
    engine = ScriptedEngine(REFUSALS)
    with Serving(engine, http=True) as server:
        yield engine, server


@pytest.fixture
def engine(running: tuple[ScriptedEngine, Serving]) -> ScriptedEngine:
    engine, _ = running
    engine.requests.clear()
    engine.cancelled.clear()
    return engine


@pytest.fixture
def serving(running: tuple[ScriptedEngine, Serving]) -> Serving:
    return running[1]


def connect(serving: Serving, secret: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{serving.url}/v1", api_key=secret, max_retries=0, timeout=20.0)


@pytest.fixture
def client(serving: Serving, engine: ScriptedEngine) -> Iterator[OpenAI]:
    with connect(serving) as connected:
        yield connected


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def chat(client: OpenAI, text: str, **options: Any) -> Any:
    return client.chat.completions.create(model="greenroom", messages=said(text), **options)


def test_the_models_are_the_repertoire_and_its_tasks(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["greenroom", "greenroom:dates", "greenroom:orders"]
    assert client.models.retrieve("greenroom:dates").owned_by == "greenroom"
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.models.retrieve("nobody")


def test_a_chat_completion_has_text_usage_and_our_routing_report(client: OpenAI) -> None:
    answer = chat(client, "one two three")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "one two three", "stop")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 3, 10)
    assert (answer.object, answer.model) == ("chat.completion", "greenroom")
    report = answer.greenroom
    assert (report["task"], report["how"], report["margin"], report["generation"]) == ("orders", "located", 0.125, 3)
    assert report["experts"][0]["digest"] == DIGEST
    assert [score["task"] for score in report["scores"]] == ["orders", "dates"]


def test_usage_says_how_many_tokens_of_the_prompt_were_cached(client: OpenAI) -> None:
    assert chat(client, "one").usage.prompt_tokens_details.cached_tokens == 4


def test_tasks_answer_together_by_their_weights(client: OpenAI, engine: ScriptedEngine) -> None:
    report = chat(client, "one", extra_body={"task_weights": {"orders": 3, "dates": 1}}).greenroom
    assert engine.requests[0].task_weights == {"orders": 3.0, "dates": 1.0}
    assert (report["task"], report["how"], report["task_weights"]) == (
        None,
        "weighted",
        {"orders": 0.75, "dates": 0.25},
    )


def test_a_completion_takes_the_whole_prompt_as_it_is(client: OpenAI, engine: ScriptedEngine) -> None:
    answer = client.completions.create(model="greenroom:dates", prompt="a b")
    assert (answer.choices[0].text, answer.object, answer.id[:5]) == ("a b", "text_completion", "cmpl-")
    chat(client, "a b")
    completion, message = engine.requests
    assert (completion.raw, completion.task) == (True, "dates")
    assert (message.raw, message.task, message.messages[0].content) == (False, None, "a b")


def test_a_streamed_chat_begins_with_the_routing_and_ends_with_usage(client: OpenAI) -> None:
    chunks = list(chat(client, "one two", stream=True, stream_options={"include_usage": True}))
    assert chunks[0].greenroom["task"] == "orders"
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert texts == ["", "one", " two", ""]
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices] == [None, None, None, "stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 9
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_streamed_completion_gives_its_text_in_pieces(client: OpenAI) -> None:
    chunks = list(client.completions.create(model="greenroom", prompt="a b", stream=True))
    assert [choice.text for chunk in chunks for choice in chunk.choices] == ["", "a", " b", ""]
    assert all(chunk.usage is None for chunk in chunks)


def test_text_comes_before_the_answer_is_complete(client: OpenAI, engine: ScriptedEngine) -> None:
    stream = iter(chat(client, "hold b", stream=True))
    next(stream)
    assert next(stream).choices[0].delta.content == "hold"
    engine.wait_live(1)
    engine.release()
    assert [chunk.choices[0].delta.content for chunk in stream] == [" b", None]


def test_every_option_reaches_the_engine(client: OpenAI, engine: ScriptedEngine) -> None:
    chat(
        client,
        "a",
        max_completion_tokens=5,
        temperature=0.5,
        top_p=0.9,
        seed=11,
        stop=["\n", "END"],
        n=1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logprobs=True,
        top_logprobs=3,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}},
        extra_body={"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.5},
    )
    sampling = engine.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (5, 0.5, 0.9, 11)
    assert (sampling.stop, sampling.n, sampling.top_k, sampling.min_p) == (("\n", "END"), 1, 4, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, -0.5, 1.5)
    assert sampling.logprobs == 3
    assert json.loads(sampling.json_schema or "") == {"type": "array"}
    client.completions.create(
        model="greenroom",
        prompt=["a"],
        max_tokens=2,
        stop="x",
        logprobs=1,
        extra_body={"base_only": True, "ignore_eos": True},
    )
    request = engine.requests[1]
    assert (request.base_only, request.text) == (True, "a")
    assert (request.sampling.max_tokens, request.sampling.stop, request.sampling.logprobs) == (2, ("x",), 1)
    assert request.sampling.ignore_eos


def test_several_choices_each_have_their_text_and_end(client: OpenAI) -> None:
    answer = chat(client, "a b", n=3)
    assert [choice.message.content for choice in answer.choices] == ["a b", "choice 1", "choice 2"]
    assert [(choice.index, choice.finish_reason) for choice in answer.choices] == [
        (0, "stop"),
        (1, "stop"),
        (2, "stop"),
    ]
    texts = {0: "", 1: "", 2: ""}
    for chunk in chat(client, "a b", n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {0: "a b", 1: "choice 1", 2: "choice 2"}


def test_log_probabilities_have_the_shape_of_each_kind(client: OpenAI) -> None:
    content = chat(client, "a b", logprobs=True, top_logprobs=1).choices[0].logprobs.content
    assert [(token.token, token.logprob, token.bytes) for token in content] == [
        ("a", -0.5, [97]),
        (" b", -0.5, [32, 98]),
    ]
    assert content[0].top_logprobs[0].token == "a"
    plain = client.completions.create(model="greenroom", prompt="a b", logprobs=1).choices[0].logprobs
    assert plain is not None
    assert (plain.tokens, plain.token_logprobs) == (["a", " b"], [-0.5, -0.5])
    assert plain.top_logprobs == [{"a": -0.5}, {" b": -0.5}]
    chunks = list(chat(client, "a", logprobs=True, stream=True))
    assert chunks[1].choices[0].logprobs.content[0].top_logprobs == []


def test_explain_adds_the_weights_of_the_experts_per_layer(client: OpenAI) -> None:
    layers = [{"layer": 2, "experts": {DIGEST: 0.75}, "groups": {}}]
    assert chat(client, "a", extra_body={"explain": True}).greenroom["layers"] == layers
    chunks = list(chat(client, "a", stream=True, extra_body={"explain": True}))
    assert [chunk.greenroom["layers"] for chunk in chunks if "layers" in (getattr(chunk, "greenroom", None) or {})] == [
        layers
    ]
    assert "layers" not in chat(client, "a").greenroom


def test_a_chat_of_several_turns_reaches_the_engine_as_it_was(client: OpenAI, engine: ScriptedEngine) -> None:
    turns: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four"},
    ]
    extra = {"default_task": "dates", "priority": -3}
    client.chat.completions.create(model="greenroom", messages=turns, extra_body=extra)
    (request,) = engine.requests
    assert [(turn.role, turn.content) for turn in request.messages] == [
        ("system", "Be brief."),
        ("user", "one two"),
        ("assistant", "three"),
        ("user", "four"),
    ]
    assert (request.default_task, request.priority) == ("dates", -3)


def test_what_is_not_set_takes_the_engines_defaults(client: OpenAI, engine: ScriptedEngine) -> None:
    chat(client, "a", response_format={"type": "text"}, logprobs=False)
    chat(client, "a", response_format={"type": "json_object"})
    plain, as_object = engine.requests
    assert (plain.sampling.logprobs, plain.sampling.json_schema) == (None, None)
    assert json.loads(as_object.sampling.json_schema or "") == {"type": "object"}


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"user": "someone"}, "user"),
        ({"tools": []}, "tools"),
        ({"logit_bias": {"1": 2}}, "logit_bias"),
        ({"extra_body": {"colour": 1}}, "colour"),
        ({"extra_body": {"messages": []}}, "messages"),
        ({"extra_body": {"messages": [{"role": "tool", "content": "x"}]}}, "messages.0.role"),
        ({"extra_body": {"temperature": "1"}}, "temperature"),
        ({"temperature": 11}, "temperature"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 1, "max_tokens": 1}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"stop": [""]}, "stop"),
        ({"n": 0}, "n"),
        ({"extra_body": {"messages": [{"role": "assistant", "content": "x"}]}}, "messages[0].role"),
        ({"extra_body": {"priority": 1000}}, "priority"),
        ({"extra_body": {"default_task": "../x"}}, "default_task"),
    ],
)
def test_what_is_not_supported_or_out_of_range_is_refused_by_its_name(
    client: OpenAI, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, "a", **options)
    assert (caught.value.param, caught.value.code) == (param, "INVALID_FIELD")
    assert caught.value.type == "invalid_request_error"


def test_a_pinned_task_and_the_plain_base_exclude_each_other(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="greenroom:dates", prompt="a", extra_body={"base_only": True})
    assert caught.value.param == "base_only"
    weights = {"task_weights": {"orders": 1.0}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="greenroom:dates", prompt="a", extra_body=weights)
    assert caught.value.param == "task_weights"


@pytest.mark.parametrize(
    ("text", "status", "code"),
    [
        ("refuse task", 404, "UNKNOWN_TASK"),
        ("refuse input", 400, "INVALID_FIELD"),
        ("refuse digest", 422, "DIGEST_MISMATCH"),
        ("refuse full", 429, "QUEUE_FULL"),
        ("refuse budget", 429, "BUDGET_TOO_SMALL"),
        ("refuse older", 409, "GENERATION_MISMATCH"),
        ("refuse draining", 503, "UNAVAILABLE"),
        ("refuse late", 504, "DEADLINE_EXCEEDED"),
        ("refuse bug", 500, "INTERNAL"),
        ("fail digest", 422, "DIGEST_MISMATCH"),
    ],
)
def test_a_refusal_has_its_status_and_says_no_more_than_it_may(
    client: OpenAI, text: str, status: int, code: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        chat(client, text)
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert "/s" not in caught.value.message
    retry = caught.value.response.headers.get("retry-after")
    assert (retry is not None) == (code == "QUEUE_FULL")


def test_a_refused_field_is_named_as_the_client_calls_it(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, "refuse input")
    assert caught.value.param == "messages"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="greenroom", prompt="refuse input")
    assert caught.value.param == "prompt"


def test_a_stream_that_fails_ends_in_an_error(client: OpenAI) -> None:
    with pytest.raises(openai.APIError) as caught:
        list(chat(client, "fail digest", stream=True))
    assert caught.value.code == "DIGEST_MISMATCH"


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt", prompt="a")
    assert caught.value.code == "UNKNOWN_MODEL"


def test_leaving_a_stream_cancels_the_request(client: OpenAI, engine: ScriptedEngine) -> None:
    with chat(client, "hold b", stream=True) as stream:
        next(iter(stream))
        engine.wait_live(1)
    engine.wait_cancelled()
    engine.wait_live(0)


def test_with_tokens_configured_only_a_known_token_infers() -> None:
    engine = ScriptedEngine()
    entry = TokenEntry(name="user", sha256=digest_of(SECRET), scopes=["infer"])
    guard = Guard.of(Tokens([entry], [TenantLimits(name="user", max_in_flight=1)]))
    with Serving(engine, http=True, guard=guard) as serving, connect(serving, SECRET) as known:
        with connect(serving) as stranger, pytest.raises(openai.AuthenticationError) as refused:
            chat(stranger, "a", extra_body={"colour": 1})
        assert refused.value.type == "authentication_error"
        held = chat(known, "hold b", stream=True)
        next(iter(held))
        with pytest.raises(openai.RateLimitError) as limited:
            chat(known, "a")
        assert limited.value.code == "QUOTA_EXCEEDED"
        engine.release()
        assert [chunk.choices[0].finish_reason for chunk in held][-1] == "stop"
        assert chat(known, "a").choices[0].message.content == "a"


def test_a_request_keeps_the_id_that_its_client_gave_it(client: OpenAI, engine: ScriptedEngine) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model="greenroom", messages=said("a"), extra_headers={"x-request-id": "mine"}
    )
    assert answer.headers["x-request-id"] == "mine"
    assert answer.parse().id == "chatcmpl-mine"
    assert engine.requests[0].request_id == "mine"
