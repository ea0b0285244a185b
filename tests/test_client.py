"""The client without a server: what it builds, what it understands, and what it refuses to send.

It does not know the server's code; `test_service.py` has both ends.
Read first: `FailedCall` is a failed call as gRPC hands it over.
"""

from __future__ import annotations

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

import greenroom
from greenroom import Delta, Done, Routing, Usage, wire
from greenroom.client_errors import FieldViolation, client_error, translated
from greenroom.options import GenerateOptions
from greenroom.pb.greenroom.v1 import greenroom_pb2 as pb

ROUTING = Routing(task=None, how="base", margin=0.0, scores=(), generation=1, experts=(), request_id="r")
USAGE = Usage(prompt_tokens=1, completion_tokens=2, queue_s=0.0, first_token_s=0.1, total_s=0.2)
DONE = Done(finish_reason="length", usage=USAGE, request_id="r")


class FailedCall(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, text: str | None, *details: object, request_id: str = "") -> None:
        self._code, self._text, self._details, self._request_id = code, text, details, request_id

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._text

    def initial_metadata(self) -> tuple[tuple[str, str], ...] | None:
        return (("x-request-id", self._request_id),) if self._request_id else None

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...] | None:
        if not self._details:
            return None
        status = status_pb2.Status(code=self._code.value[0])
        for detail in self._details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        return (("grpc-status-details-bin", status.SerializeToString()),)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("INVALID_ARGUMENT", greenroom.InvalidRequestError),
        ("NOT_FOUND", greenroom.NotFoundError),
        ("FAILED_PRECONDITION", greenroom.FailedPreconditionError),
        ("RESOURCE_EXHAUSTED", greenroom.ExhaustedError),
        ("UNAVAILABLE", greenroom.UnavailableError),
        ("DEADLINE_EXCEEDED", greenroom.DeadlineExceededError),
        ("CANCELLED", greenroom.CancelledError),
        ("ABORTED", greenroom.AbortedError),
        ("UNAUTHENTICATED", greenroom.UnauthenticatedError),
        ("PERMISSION_DENIED", greenroom.PermissionDeniedError),
        ("INTERNAL", greenroom.InternalError),
        ("UNIMPLEMENTED", greenroom.GreenroomClientError),
    ],
)
def test_each_code_has_its_class_even_without_details(code: str, kind: type[greenroom.GreenroomClientError]) -> None:
    error = client_error(FailedCall(grpc.StatusCode[code], None))
    assert type(error) is kind
    assert (error.code, error.reason, error.message) == (grpc.StatusCode[code], code, code)
    assert (error.request_id, error.retry_after_s, error.field_violations) == ("", None, ())


def test_rich_details_are_read() -> None:
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(1500)
    violation = error_details_pb2.BadRequest.FieldViolation(field="top_p", description="too large")
    error = client_error(
        FailedCall(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "full",
            error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="greenroom"),
            error_details_pb2.RetryInfo(retry_delay=delay),
            error_details_pb2.BadRequest(field_violations=[violation]),
            error_details_pb2.RequestInfo(request_id="r1"),
            pb.Base(name="a detail of a newer server"),
            request_id="r2",
        )
    )
    assert (error.reason, error.message, error.request_id) == ("QUEUE_FULL", "full", "r1")
    assert error.retry_after_s == 1.5
    assert error.field_violations == (FieldViolation("top_p", "too large"),)


def test_without_details_the_request_id_comes_from_the_headers() -> None:
    assert client_error(FailedCall(grpc.StatusCode.UNAVAILABLE, "gone", request_id="r2")).request_id == "r2"


def test_an_error_is_raised_from_what_grpc_raised() -> None:
    cause = FailedCall(grpc.StatusCode.NOT_FOUND, "no such task")
    with pytest.raises(greenroom.NotFoundError, match="no such task") as caught, translated():
        raise cause
    assert caught.value.__cause__ is cause


def test_options_left_out_are_not_sent() -> None:
    empty: GenerateOptions = {
        "task": None,
        "base_only": False,
        "raw": False,
        "max_tokens": None,
        "stop": (),
        "ignore_eos": False,
        "request_id": "",
    }
    for options in ({}, empty):
        assert wire.generate_request("x", options) == pb.GenerateRequest(input="x")


def test_zero_is_sent_where_zero_means_something() -> None:
    message = wire.generate_request("x", {"temperature": 0.0, "top_k": 0, "seed": 0})
    assert [field.name for field, _ in message.sampling.ListFields()] == ["temperature", "top_k", "seed"]


def test_raw_text_is_a_raw_prompt() -> None:
    assert wire.generate_request("x", {"raw": True}) == pb.GenerateRequest(raw_prompt="x")
    assert wire.locate_request("x", {"raw": True, "request_id": "r"}) == pb.LocateRequest(
        raw_prompt="x", request_id="r"
    )


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("task", {"task": "a", "base_only": True}),
        ("task", {"task": 3}),
        ("default_task", {"default_task": "a", "abstain_fails": True}),
        ("priority", {"priority": "high"}),
        ("group_bias", {"group_bias": {"left": "much"}}),
        ("group_mask", {"group_mask": "left"}),
        ("task_weights", {"task_weights": {"left": "half"}}),
        ("sampling.max_tokens", {"max_tokens": 2**31}),
        ("sampling.max_tokens", {"max_tokens": 1.5}),
        ("sampling.seed", {"seed": 2**63}),
        ("sampling.stop", {"stop": "END"}),
        ("sampling.stop", {"stop": [3]}),
        ("sampling.temperature", {"temperature": "hot"}),
        ("sampling.regex", {"regex": "a", "json_schema": "{}"}),
        ("sampling.json_schema", {"json_schema": {"type": {1, 2}}}),
    ],
)
def test_what_the_wire_cannot_carry_is_refused_by_its_field(field: str, options: GenerateOptions) -> None:
    with pytest.raises(greenroom.InvalidRequestError) as caught:
        wire.generate_request("x", options)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert [violation.field for violation in caught.value.field_violations] == [field]


@pytest.mark.parametrize(
    ("field", "chat", "raw"),
    [
        ("chat.messages[0]", [{"role": "robot", "content": "x"}], False),
        ("chat.messages[0]", [{"role": "user"}], False),
        ("chat.messages[1]", [{"role": "user", "content": "x"}, {"role": "user", "content": "x", "name": "me"}], False),
        ("chat.messages[0].content", [{"role": "user", "content": 3}], False),
        ("raw_prompt", [{"role": "user", "content": "x"}], True),
    ],
)
def test_a_chat_that_is_none_is_refused_by_its_field(field: str, chat: list[dict[str, str]], raw: bool) -> None:
    with pytest.raises(greenroom.InvalidRequestError) as caught:
        wire.generate_request(chat, {"raw": raw})
    assert [violation.field for violation in caught.value.field_violations] == [field]


def test_options_of_another_call_are_type_errors() -> None:
    with pytest.raises(TypeError, match="max_tokens"):
        wire.score_request("x", "y", {"max_tokens": 3})  # type: ignore[typeddict-unknown-key]
    with pytest.raises(TypeError, match="task"):
        wire.locate_request("x", {"task": "a"})  # type: ignore[typeddict-unknown-key]


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(greenroom.InvalidRequestError):
        wire.generate_request("\ud800", {})


def test_an_option_that_does_not_exist_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="max_token"):
        wire.generate_request("x", {"max_token": 3})  # type: ignore[typeddict-unknown-key]


def test_an_answer_joins_all_deltas_in_order() -> None:
    answer = wire.answer([ROUTING, Delta("", (1,)), Delta("ab", (2, 3)), Delta("c", ()), DONE])
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("abc", (1, 2, 3), "length")
    assert (answer.routing, answer.usage, answer.request_id) == (ROUTING, USAGE, "r")


def test_choices_that_come_interleaved_are_told_apart() -> None:
    first, second = (greenroom.TokenLogprob(greenroom.Alternative(token, "x", -0.5), ()) for token in (1, 2))
    deltas = [Delta("a", (1,), 0, (first,)), Delta("b", (2,), 1, (second,)), Delta("c", (3,), 0)]
    done = Done(finish_reason="stop", usage=USAGE, request_id="r", other_finish_reasons=("length",))
    answer = wire.answer([ROUTING, *deltas, done])
    assert answer.choices == (
        greenroom.Choice(text="ac", token_ids=(1, 3), finish_reason="stop", logprobs=(first,)),
        greenroom.Choice(text="b", token_ids=(2,), finish_reason="length", logprobs=(second,)),
    )


@pytest.mark.parametrize("events", [[], [ROUTING], [DONE], [ROUTING, Delta("a", (1,))]])
def test_a_stream_without_its_ends_is_an_error(events: list[greenroom.StreamEvent]) -> None:
    with pytest.raises(greenroom.InternalError) as caught:
        wire.answer(events)
    assert caught.value.reason == "BAD_RESPONSE"


@pytest.mark.parametrize(
    "message",
    [
        pb.GenerateResponse(),
        pb.GenerateResponse(routing=pb.Routing()),
        pb.GenerateResponse(done=pb.Done()),
        pb.GenerateResponse(routing=pb.Routing(how=99)),  # type: ignore[arg-type]
    ],
    ids=["no event", "no how", "no finish reason", "unknown how"],
)
def test_what_the_client_does_not_know_is_an_error_not_a_guess(message: pb.GenerateResponse) -> None:
    with pytest.raises(greenroom.InternalError) as caught:
        wire.event(message)
    assert caught.value.reason == "BAD_RESPONSE"


def test_speed_counts_from_leaving_the_queue() -> None:
    usage = Usage(prompt_tokens=1, completion_tokens=6, queue_s=1.0, first_token_s=1.5, total_s=4.0)
    assert usage.tokens_per_s == 2.0
    assert Usage(prompt_tokens=1, completion_tokens=0, queue_s=1.0, first_token_s=1.0, total_s=1.0).tokens_per_s == 0.0


def test_a_token_is_not_shown() -> None:
    assert "secret" not in repr(vars(greenroom.Client("127.0.0.1:1", token="secret")))
