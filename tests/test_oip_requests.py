"""Requests of the Open Inference Protocol that no real client sends: typed, malformed, or with fields of the future.

It does not know calls: messages are converted here without a server.
Read first: `message` is a good request, and each test spoils one thing of it.
"""

from __future__ import annotations

import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import ScriptedEngine

from greenroom.pb.inference import grpc_service_pb2 as pb
from runtime.errors import InvalidInputError, UnavailableError
from runtime.service.answers import Answers
from runtime.service.models import Models
from runtime.service.oip_request import Inference, inference_of
from runtime.service.oip_tensors import add_output, text_of


def models(*, is_ready: bool = True) -> Models:
    engine = ScriptedEngine()
    answers = Answers(engine, num_threads=1)  # type: ignore[arg-type]
    return Models(engine, answers, name="greenroom", is_ready=lambda: is_ready)  # type: ignore[arg-type]


def message(raw: bytes | None = struct.pack("<I", 2) + b"hi") -> pb.ModelInferRequest:
    tensor = pb.ModelInferRequest.InferInputTensor(name="text_input", datatype="BYTES", shape=[1])
    return pb.ModelInferRequest(model_name="greenroom", inputs=[tensor], raw_input_contents=[raw] if raw else [])


def convert(wanted: pb.ModelInferRequest, deadline: float | None = None) -> Inference:
    return inference_of(wanted, models(), deadline=deadline)


def field_of_refusal(wanted: pb.ModelInferRequest) -> str:
    with pytest.raises(InvalidInputError) as caught:
        convert(wanted)
    return caught.value.field


@given(st.text(min_size=1))
def test_raw_and_typed_inputs_give_the_same_text(text: str) -> None:
    encoded = text.encode()
    typed = message(None)
    typed.inputs[0].contents.bytes_contents.append(encoded)
    assert text_of(message(struct.pack("<I", len(encoded)) + encoded)) == text_of(typed) == text


@given(st.lists(st.integers(-(2**63), 2**63 - 1)), st.text())
def test_outputs_are_raw_and_in_order(ids: list[int], text: str) -> None:
    response = pb.ModelInferResponse()
    add_output(response, "token_ids", ids)
    add_output(response, "text_output", text)
    assert [(list(o.shape), o.datatype) for o in response.outputs] == [([len(ids)], "INT64"), ([1], "BYTES")]
    raw_ids, raw_text = response.raw_output_contents
    assert list(struct.unpack(f"<{len(ids)}q", raw_ids)) == ids
    assert raw_text == struct.pack("<I", len(text.encode())) + text.encode()


@given(st.binary(max_size=40))
def test_any_bytes_give_a_text_or_a_refusal(raw: bytes) -> None:
    try:
        outcome = text_of(message(raw)).encode()
    except InvalidInputError as error:
        outcome = error.field.encode()
    allowed = {b"raw_input_contents", b"inputs.contents", b"text_input"}
    assert outcome in allowed or raw == struct.pack("<I", len(outcome)) + outcome


def test_an_input_of_another_shape_or_number_is_refused() -> None:
    none = message()
    del none.inputs[:]
    assert field_of_refusal(none) == "inputs"
    twice = message()
    twice.inputs.add().CopyFrom(twice.inputs[0])
    assert field_of_refusal(twice) == "inputs"
    large = message()
    large.inputs[0].shape[:] = [2]
    assert field_of_refusal(large) == "inputs.shape"
    deep = message()
    deep.inputs[0].shape[:] = [1] * 9
    assert field_of_refusal(deep) == "inputs.shape"
    square = message()
    square.inputs[0].shape[:] = [1, 1]
    assert convert(square).request.text == "hi"


def test_contents_of_another_type_or_in_two_places_are_refused() -> None:
    numbers = message(None)
    numbers.inputs[0].contents.int64_contents.append(3)
    assert field_of_refusal(numbers) == "inputs.contents"
    both = message()
    both.inputs[0].contents.bytes_contents.append(b"hi")
    assert field_of_refusal(both) == "inputs.contents"
    more = message()
    more.raw_input_contents.append(b"x")
    assert field_of_refusal(more) == "raw_input_contents"
    assert field_of_refusal(message(None)) == "inputs.contents"


def test_an_empty_text_and_one_that_is_not_text_are_refused() -> None:
    assert field_of_refusal(message(struct.pack("<I", 0))) == "text_input"
    assert field_of_refusal(message(struct.pack("<I", 1) + b"\xff")) == "text_input"


def test_parameters_of_tensors_are_refused() -> None:
    incoming = message()
    incoming.inputs[0].parameters["shared_memory_region"].string_param = "x"
    assert field_of_refusal(incoming) == "inputs.parameters"
    outgoing = message()
    outgoing.outputs.add(name="text_output").parameters["classification"].int64_param = 3
    assert field_of_refusal(outgoing) == "outputs.parameters"
    double = message()
    double.outputs.add(name="text_output")
    double.outputs.add(name="text_output")
    assert field_of_refusal(double) == "outputs"


def test_a_field_of_the_future_is_refused() -> None:
    future = pb.ModelInferRequest.FromString(message().SerializeToString() + b"\xc8\x3e\x01")
    assert field_of_refusal(future) == "1001"


def test_a_timeout_only_makes_a_deadline_earlier() -> None:
    wanted = message()
    wanted.parameters["timeout"].int64_param = 3_600_000_000
    soon = time.monotonic() + 5
    assert convert(wanted, soon).request.deadline == soon
    alone = convert(wanted).request.deadline
    assert alone is not None
    assert alone > soon


def test_requests_of_one_id_get_names_of_their_own() -> None:
    wanted = message()
    wanted.id = "1"
    first, second = convert(wanted), convert(wanted)
    assert first.client_id == second.client_id == "1"
    assert first.request.request_id != second.request.request_id


def test_a_server_that_is_not_ready_has_no_ready_model() -> None:
    with pytest.raises(UnavailableError, match="starting or draining"):
        inference_of(message(), models(is_ready=False), deadline=None)


def test_a_repertoires_name_cannot_hold_the_colon_that_pins_a_task() -> None:
    with pytest.raises(InvalidInputError, match="name"):
        Models(ScriptedEngine(), None, name="a:b", is_ready=lambda: True)  # type: ignore[arg-type]
