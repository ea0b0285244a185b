"""The service over a real connection: what is asked reaches the engine, and what it says comes back, in order.

It does not know models: the engine plays a script.
Read first: life-cycle, drain and cancellation are in `test_service_life.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import replace

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from scripted_engine import DIGEST, ScriptedEngine
from serving import Serving

import greenroom
from greenroom import Client, Delta, Done, Routing
from greenroom.pb.greenroom.v1 import greenroom_pb2 as pb
from greenroom.pb.greenroom.v1 import greenroom_pb2_grpc
from runtime import errors
from runtime.engine.request import Request, SamplingParams
from runtime.model.turns import Message
from runtime.service.convert import MAX_PROMPT_CHARS

WIRE_ERRORS = [
    (errors.InvalidInputError("text", "x", "9 tokens too long"), greenroom.InvalidRequestError, "INVALID_FIELD"),
    (errors.UnknownTaskError("no task of this name"), greenroom.NotFoundError, "UNKNOWN_TASK"),
    (errors.NoTaskNearError("none is near"), greenroom.NotFoundError, "NO_TASK_NEAR"),
    (errors.DigestMismatchError("/srv/blob"), greenroom.FailedPreconditionError, "DIGEST_MISMATCH"),
    (errors.QueueFullError("full"), greenroom.ExhaustedError, "QUEUE_FULL"),
    (errors.BudgetError("too small"), greenroom.ExhaustedError, "BUDGET_TOO_SMALL"),
    (errors.UnavailableError("draining"), greenroom.UnavailableError, "UNAVAILABLE"),
    (errors.DeadlineError("too late"), greenroom.DeadlineExceededError, "DEADLINE_EXCEEDED"),
    (errors.CancelledError("cancelled"), greenroom.CancelledError, "CANCELLED"),
    (errors.GenerationMismatchError("older"), greenroom.AbortedError, "GENERATION_MISMATCH"),
    (errors.GreenroomError("a step failed"), greenroom.InternalError, "INTERNAL"),
]
REFUSALS: dict[str, Exception] = {type(error).__name__: error for error, _, _ in WIRE_ERRORS}


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine({**REFUSALS, "bug": ZeroDivisionError("/secret/path")})


@pytest.fixture
def serving(engine: ScriptedEngine) -> Iterator[Serving]:
    with Serving(engine) as server:
        yield server


@pytest.fixture
def client(serving: Serving) -> Iterator[Client]:
    with Client(serving.target, timeout_s=20.0) as connected:
        yield connected


@pytest.fixture
def stub(serving: Serving) -> Iterator[greenroom_pb2_grpc.GreenroomStub]:
    with grpc.insecure_channel(serving.target) as channel:
        yield greenroom_pb2_grpc.GreenroomStub(channel)


def test_a_stream_is_one_routing_then_deltas_then_one_done(client: Client) -> None:
    first, *middle, last = client.stream("one two three", request_id="r1")
    assert isinstance(first, Routing)
    assert middle == [Delta("one", (0,)), Delta(" two", (1,)), Delta(" three", (2,))]
    assert isinstance(last, Done)
    assert (first.request_id, last.request_id, last.finish_reason) == ("r1", "r1", "stop")


def test_an_answer_has_all_that_the_engine_said(client: Client) -> None:
    answer = client.generate("one two", request_id="r1")
    assert (answer.text, answer.token_ids) == ("one two", (0, 1))
    assert answer.routing == greenroom.Routing(
        task="orders",
        how="located",
        margin=0.125,
        scores=(greenroom.TaskScore("orders", 1.0), greenroom.TaskScore("dates", 1.125)),
        generation=3,
        experts=(
            greenroom.ExpertUse(
                digest=DIGEST, task="orders", num_layers=4, source="disk", bytes_read=4096, load_s=0.25
            ),
        ),
        request_id="r1",
    )
    assert answer.usage == greenroom.Usage(
        prompt_tokens=7, completion_tokens=2, queue_s=0.5, first_token_s=0.75, total_s=2.5, cached_tokens=4
    )
    assert answer.usage.tokens_per_s == 1.0


def test_every_option_reaches_the_engine(client: Client, engine: ScriptedEngine) -> None:
    client.generate(
        "text",
        task="dates",
        raw=True,
        max_tokens=5,
        temperature=0.7,
        top_p=0.9,
        top_k=0,
        seed=0,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.5,
        n=1,
        logprobs=0,
        stop=["\n", "END"],
        ignore_eos=True,
        request_id="r1",
    )
    (request,) = engine.requests
    assert request.deadline is not None
    assert replace(request, deadline=None) == Request(
        request_id="r1",
        text="text",
        raw=True,
        task="dates",
        sampling=SamplingParams(
            max_tokens=5,
            temperature=0.7,
            top_p=0.9,
            top_k=0,
            seed=0,
            min_p=0.25,
            repetition_penalty=1.5,
            presence_penalty=-0.5,
            frequency_penalty=0.5,
            n=1,
            logprobs=0,
            stop=("\n", "END"),
            ignore_eos=True,
        ),
    )


def test_constraints_reach_the_engine(client: Client, engine: ScriptedEngine) -> None:
    client.generate("text", regex="[a-z]+")
    client.generate("text", json_schema={"type": "string"})
    client.generate("text", json_schema='{"type": "string"}')
    assert [request.sampling.regex for request in engine.requests] == ["[a-z]+", None, None]
    assert [request.sampling.json_schema for request in engine.requests] == [None, *['{"type": "string"}'] * 2]


def test_options_left_out_are_the_engines_defaults(client: Client, engine: ScriptedEngine) -> None:
    answer = client.generate("text", timeout_s=float("inf"))
    assert engine.requests == [Request(request_id=answer.request_id, text="text")]


CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]


def test_routing_options_reach_the_engine_from_every_call(client: Client, engine: ScriptedEngine) -> None:
    options = {"default_task": "dates", "priority": -3, "tenant": "acme"}
    client.generate(CHAT, **options)
    client.score(CHAT, "four five", **options)
    client.locate(CHAT, priority=-3, tenant="acme")
    generate, score, locate = engine.requests
    for request in engine.requests:
        assert request.messages == tuple(Message(turn["role"], turn["content"]) for turn in CHAT)
        assert (request.text, request.raw, request.priority, request.tenant) == ("", False, -3, "acme")
    assert (generate.default_task, score.default_task, score.continuation) == ("dates", "dates", "four five")
    assert locate.locate_only
    assert all(not request.group_bias and not request.group_mask for request in engine.requests)
    client.score("text", "x", task="orders")
    client.score("text", "x", base_only=True, raw=True)
    client.generate("text", abstain_fails=True)
    pinned, base, failing = engine.requests[3:]
    assert (pinned.task, base.base_only, base.raw, failing.abstain_fails) == ("orders", True, True, True)


def test_groups_and_explanations_go_both_ways(client: Client, engine: ScriptedEngine) -> None:
    options = {"group_bias": {"left": 1.5, "right": -2.0}, "group_mask": ["up"], "explain": True}
    explained = (greenroom.LayerWeights(layer=2, experts={DIGEST: 0.75}, groups={}),)
    assert client.generate("text", **options).explanation == explained
    assert client.score("text", "x", **options).explanation == explained
    for request in engine.requests:
        assert request.group_bias == {"left": 1.5, "right": -2.0}
        assert (request.group_mask, request.explain) == (frozenset({"up"}), True)
    assert client.generate("text").explanation == ()


def test_weights_of_tasks_go_out_and_their_shares_come_back(client: Client, engine: ScriptedEngine) -> None:
    routings = [
        client.generate("text", task_weights={"orders": 3.0, "dates": 1.0}).routing,
        client.score("text", "x", task_weights={"orders": 3.0, "dates": 1.0}).routing,
    ]
    for request, routing in zip(engine.requests, routings, strict=True):
        assert request.task_weights == {"orders": 3.0, "dates": 1.0}
        assert (routing.task, routing.how) == (None, "weighted")
        assert routing.task_weights == {"orders": 0.75, "dates": 0.25}
    assert client.generate("text").routing.task_weights == {}


def test_usage_says_how_much_of_the_prompt_was_known(client: Client) -> None:
    assert client.generate("text").usage.cached_tokens == 4
    assert client.score("text", "x").usage.cached_tokens == 4


def test_a_score_has_all_that_the_engine_said(client: Client) -> None:
    score = client.score("text", "two words", request_id="r1")
    assert score.tokens == (greenroom.Alternative(0, "two", -0.5), greenroom.Alternative(1, "words", -0.5))
    assert (score.logprob, score.routing.task, score.routing.request_id) == (-1.0, "orders", "r1")
    assert score.usage.prompt_tokens == 7


def test_a_bad_score_is_refused_by_its_field(client: Client, engine: ScriptedEngine) -> None:
    for continuation in ("", "x" * (MAX_PROMPT_CHARS + 1)):
        with pytest.raises(greenroom.InvalidRequestError) as caught:
            client.score("text", continuation)
        assert [violation.field for violation in caught.value.field_violations] == ["continuation"]
    assert not engine.requests


@pytest.mark.parametrize(("error", "kind", "reason"), WIRE_ERRORS, ids=list(REFUSALS))
@pytest.mark.parametrize("verb", ["refuse", "fail"])
def test_scoring_gives_each_error_of_the_engine_as_its_own(
    client: Client, verb: str, error: Exception, kind: type[greenroom.GreenroomClientError], reason: str
) -> None:
    with pytest.raises(kind) as caught:
        client.score(f"{verb} {type(error).__name__}", "x")
    assert caught.value.reason == reason


def test_base_only_reaches_the_engine_and_names_no_task(client: Client, engine: ScriptedEngine) -> None:
    routing = client.generate("text", base_only=True).routing
    assert engine.requests[0].base_only
    assert (routing.task, routing.how, routing.experts) == (None, "base", ())


def test_locate_says_the_task_and_generates_nothing(client: Client, engine: ScriptedEngine) -> None:
    routing = client.locate("text", request_id="r1")
    assert (routing.task, routing.how, routing.margin, routing.request_id) == ("orders", "located", 0.125, "r1")
    assert engine.requests[0].locate_only


def test_describe_says_what_is_served(client: Client, engine: ScriptedEngine) -> None:
    about, truth = client.describe(), engine.statistics()
    assert (about.base_name, about.base_digest, about.generation, about.tasks) == ("tiny", DIGEST, 3, truth.tasks)
    assert vars(about.memory) == {name: getattr(truth.memory, name) for name in vars(about.memory)}
    assert vars(about.engine) == {name: getattr(truth, name) for name in vars(about.engine)}


BAD_OPTIONS = [
    ("group_bias[left]", {"group_bias": {"left": 101.0}}),
    ("group_bias[left]", {"group_bias": {"left": float("nan")}}),
    ("group_bias", {"group_bias": {f"g{n}": 1.0 for n in range(257)}}),
    ("group_mask", {"group_mask": ["up"], "base_only": True}),
    ("group_mask", {"group_mask": ["up"] * 257}),
    ("explain", {"explain": True, "base_only": True}),
    ("task_weights", {"task_weights": {"a": 1.0}, "task": "b"}),
    ("task_weights", {"task_weights": {"a": 1.0}, "base_only": True}),
    ("task_weights", {"task_weights": {"a": 1.0}, "default_task": "b"}),
    ("task_weights", {"task_weights": {"../up": 1.0}}),
    ("task_weights", {"task_weights": {"a": 0.0}}),
    ("task_weights", {"task_weights": {f"t{n}": 1.0 for n in range(9)}}),
    ("task_weights[a]", {"task_weights": {"a": -1.0}}),
    ("default_task", {"default_task": "../up"}),
    ("default_task", {"default_task": ""}),
    ("priority", {"priority": 101}),
    ("tenant", {"tenant": "Not A Name"}),
    ("task", {"task": "../up"}),
    ("task", {"task": ""}),
    ("request_id", {"request_id": "no spaces"}),
    ("request_id", {"request_id": "x" * 129}),
    ("sampling.max_tokens", {"max_tokens": 0}),
    ("sampling.max_tokens", {"max_tokens": -1}),
    ("sampling.temperature", {"temperature": -0.1}),
    ("sampling.temperature", {"temperature": float("nan")}),
    ("sampling.top_p", {"top_p": 0.0}),
    ("sampling.top_p", {"top_p": 1.5}),
    ("sampling.top_k", {"top_k": -1}),
    ("sampling.seed", {"seed": -1}),
    ("sampling.min_p", {"min_p": 1.5}),
    ("sampling.repetition_penalty", {"repetition_penalty": 0.0}),
    ("sampling.presence_penalty", {"presence_penalty": 2.5}),
    ("sampling.frequency_penalty", {"frequency_penalty": -2.5}),
    ("sampling.n", {"n": 0}),
    ("sampling.n", {"n": 17}),
    ("sampling.logprobs", {"logprobs": 21}),
    ("sampling.json_schema", {"json_schema": ""}),
    ("sampling.json_schema", {"json_schema": "{}", "ignore_eos": True}),
    ("sampling.regex", {"regex": "x" * 5000}),
    ("sampling.stop", {"stop": [""]}),
    ("sampling.stop", {"stop": ["x"] * 9}),
]


@pytest.mark.parametrize(("field", "options"), BAD_OPTIONS)
def test_a_bad_option_is_refused_by_its_field(
    client: Client, engine: ScriptedEngine, field: str, options: dict[str, object]
) -> None:
    with pytest.raises(greenroom.InvalidRequestError) as caught:
        client.generate("text", **options)  # type: ignore[arg-type]
    assert [violation.field for violation in caught.value.field_violations] == [field]
    assert caught.value.message.startswith(f"{field}=")
    assert caught.value.reason == "INVALID_FIELD"
    assert not engine.requests


@pytest.mark.parametrize(("raw", "field"), [(False, "input"), (True, "raw_prompt")])
@pytest.mark.parametrize("text", ["", "x" * (MAX_PROMPT_CHARS + 1), "refuse InvalidInputError"])
def test_a_bad_prompt_is_refused_by_the_field_that_carried_it(client: Client, raw: bool, field: str, text: str) -> None:
    for call in (client.generate, client.locate):
        with pytest.raises(greenroom.InvalidRequestError) as caught:
            call(text, raw=raw)
        assert [violation.field for violation in caught.value.field_violations] == [field]


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.GenerateRequest(), "input"),
        (pb.GenerateRequest.FromString(b"\x0a\x01x" + b"\xa0\x06\x01"), "100"),
        (pb.GenerateRequest.FromString(b"\x0a\x01x" + b"\x2a\x03\xa0\x06\x01"), "sampling.100"),
        (pb.GenerateRequest(chat=pb.Chat()), "chat.messages"),
        (pb.GenerateRequest(chat={"messages": [{"content": "x"}]}), "chat.messages[0].role"),
        (pb.GenerateRequest(chat={"messages": [{"role": 99, "content": "x"}]}), "chat.messages[0].role"),
        (pb.GenerateRequest(chat={"messages": [{"role": 2, "content": ""}]}), "chat.messages[0].content"),
        (pb.GenerateRequest(chat={"messages": [{"role": 3, "content": "x"}]}), "chat.messages[0].role"),
        (pb.GenerateRequest(chat={"messages": [{"role": 2, "content": "x"}] * 257}), "chat.messages"),
        (pb.GenerateRequest(chat={"messages": [{"role": 2, "content": "x" * 400_000}] * 3}), "chat.messages"),
        (pb.GenerateRequest.FromString(b"\x3a\x05\x0a\x03\xa0\x06\x01"), "chat.messages[0].100"),
    ],
    ids=[
        "no prompt",
        "unknown field",
        "unknown sampling field",
        "no messages",
        "no role",
        "unknown role",
        "empty message",
        "assistant last",
        "many messages",
        "long messages",
        "unknown field in a message",
    ],
)
def test_what_our_client_never_sends_is_refused_too(
    stub: greenroom_pb2_grpc.GreenroomStub, message: pb.GenerateRequest, field: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(message))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith(f"{field}=")


@pytest.mark.parametrize(("error", "kind", "reason"), WIRE_ERRORS, ids=list(REFUSALS))
@pytest.mark.parametrize("verb", ["refuse", "fail"])
def test_each_error_of_the_engine_arrives_as_its_own(
    client: Client, verb: str, error: Exception, kind: type[greenroom.GreenroomClientError], reason: str
) -> None:
    with pytest.raises(kind) as caught:
        client.generate(f"{verb} {type(error).__name__}", request_id="r1")
    assert (caught.value.reason, caught.value.request_id) == (reason, "r1")
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    assert "/srv" not in caught.value.message
    assert caught.value.retry_after_s == (1.0 if reason == "QUEUE_FULL" else None)


def test_a_bug_is_logged_with_its_trace_and_told_without(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(greenroom.InternalError) as caught:
        client.generate("refuse bug", request_id="r1")
    assert "secret" not in str(caught.value)
    (record,) = (record for record in caplog.records if record.name == "greenroom.errors")
    assert "r1" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


def test_every_call_leaves_one_access_line(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "greenroom.access"):
        client.generate("text", request_id="good")
        with pytest.raises(greenroom.NotFoundError):
            client.locate("refuse UnknownTaskError", request_id="bad")
        client.describe()
    lines = [record.getMessage().split(" ")[:3] for record in caplog.records if record.name == "greenroom.access"]
    assert lines[:2] == [
        ["/greenroom.v1.Greenroom/Generate", "OK", "request_id=good"],
        ["/greenroom.v1.Greenroom/Locate", "NOT_FOUND", "request_id=bad"],
    ]


def test_the_request_id_is_in_the_initial_metadata(stub: greenroom_pb2_grpc.GreenroomStub) -> None:
    def named(request_id: str, *headers: tuple[str, str]) -> str:
        call = stub.Generate(pb.GenerateRequest(input="x", request_id=request_id), metadata=headers)
        events = list(call)
        echoed = dict(call.initial_metadata())["x-request-id"]
        assert events[0].routing.request_id == events[-1].done.request_id == echoed
        return str(echoed)

    assert named("r1", ("x-request-id", "r2")) == "r1"
    assert named("", ("x-request-id", "r2")) == "r2"
    assert len({named(""), named("")}) == 2


def test_a_request_id_in_flight_is_not_taken_twice(client: Client, engine: ScriptedEngine) -> None:
    held = client.stream("hold on", request_id="r1")
    next(held)
    with pytest.raises(greenroom.InvalidRequestError) as caught:
        client.generate("text", request_id="r1")
    assert caught.value.field_violations[0].field == "request_id"
    assert not engine.cancelled
    engine.release()
    assert isinstance(list(held)[-1], Done)


def test_a_message_over_the_limit_is_refused() -> None:
    with Serving(ScriptedEngine(), max_message_bytes=1000) as serving, Client(serving.target) as client:
        assert client.generate("x" * 900).text == "x" * 900
        with pytest.raises(greenroom.ExhaustedError) as caught:
            client.generate("x" * 1100)
        assert (caught.value.reason, caught.value.retry_after_s) == ("RESOURCE_EXHAUSTED", None)


def test_calls_over_the_limit_are_refused(engine: ScriptedEngine) -> None:
    with Serving(engine, max_calls=1) as serving, Client(serving.target) as client:
        held = client.stream("hold on")
        next(held)
        with pytest.raises(greenroom.ExhaustedError):
            client.generate("text")
        engine.release()
        assert isinstance(list(held)[-1], Done)


def test_reflection_lists_the_services(serving: Serving) -> None:
    with grpc.insecure_channel(serving.target) as channel:
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        (reply,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]))
    assert {service.name for service in reply.list_services_response.service} == {
        "greenroom.v1.Greenroom",
        "inference.GRPCInferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def test_many_streams_at_once_each_get_their_own_answer(serving: Serving) -> None:
    async def ask_all() -> list[str]:
        async with greenroom.AsyncClient(serving.target, timeout_s=20.0) as client:
            answers = await asyncio.gather(*(client.generate(f"number {n}") for n in range(64)))
            return [answer.text for answer in answers]

    assert asyncio.run(ask_all()) == [f"number {n}" for n in range(64)]


def test_the_async_client_says_the_same_as_the_blocking_one(serving: Serving, client: Client) -> None:
    async def ask() -> list[object]:
        async with greenroom.AsyncClient(serving.target) as other:
            events = [event async for event in other.stream("one two", request_id="r1")]
            answer = await other.generate("one two", request_id="r1")
            located = await other.locate("x", request_id="r1")
            score = await other.score("x", "y z", request_id="r1")
            return [events, answer, located, score, await other.describe(), await other.health()]

    assert asyncio.run(ask()) == [
        list(client.stream("one two", request_id="r1")),
        client.generate("one two", request_id="r1"),
        client.locate("x", request_id="r1"),
        client.score("x", "y z", request_id="r1"),
        client.describe(),
        client.health(),
    ]
