"""The Open Inference Protocol, spoken by the real `tritonclient[grpc]` from a process of its own.

It does not know models: the engine plays a script.
Read first: `call` asks the server of the test; requests that no real client would send are in `test_oip_requests.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from scripted_engine import DIGEST, ScriptedEngine
from serving import Serving
from triton_process import TritonProcess

from greenroom.pb.inference import grpc_service_pb2 as pb
from greenroom.pb.inference import grpc_service_pb2_grpc
from runtime import errors
from runtime.service.guard import Guard
from runtime.service.tokens import TenantLimits, TokenEntry, Tokens, digest_of, new_secret

Call = Callable[..., Any]
BOSS, USER = new_secret(), new_secret()


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(
        {
            "task": errors.UnknownTaskError("no task of this name"),
            "input": errors.InvalidInputError("input", "x", "9 prompt tokens too many"),
            "digest": errors.DigestMismatchError("/srv/blob"),
            "bug": ZeroDivisionError("/secret/path"),
        }
    )


@pytest.fixture
def serving(engine: ScriptedEngine) -> Iterator[Serving]:
    with Serving(engine) as server:
        yield server


@pytest.fixture
def call(triton: TritonProcess, serving: Serving) -> Call:
    return lambda name, **kwargs: triton.ask(serving.target, name, **kwargs)


@pytest.fixture
def guarded(triton: TritonProcess, engine: ScriptedEngine) -> Iterator[Call]:
    """Asks a server with tokens, as the administrator where nothing else is said."""
    entries = [
        TokenEntry(name="boss", sha256=digest_of(BOSS), scopes=["infer", "admin"]),
        TokenEntry(name="user", sha256=digest_of(USER), scopes=["infer"]),
    ]
    guard = Guard.of(Tokens(entries, [TenantLimits(name="user", max_in_flight=1)]))
    with Serving(engine, guard=guard) as server:

        def ask(name: str, **kwargs: Any) -> Any:
            return triton.ask(server.target, name, **{"headers": {"authorization": f"Bearer {BOSS}"}, **kwargs})

        yield ask


def texts_of(pieces: list[dict[str, Any]], client_id: str) -> str:
    own = [piece for piece in pieces if piece.get("id") == client_id]
    return "".join(text for piece in own for text in piece["outputs"].get("text_output", ()))


def test_a_serving_server_is_live_and_ready_and_so_are_its_models(call: Call) -> None:
    assert call("is_server_live") is True
    assert call("is_server_ready") is True
    assert call("is_model_ready", model_name="greenroom") is True
    assert call("is_model_ready", model_name="greenroom:dates", model_version="3") is True
    assert call("is_model_ready", model_name="greenroom:dates", model_version="2") is False
    assert call("is_model_ready", model_name="greenroom:nobody") is False


def test_a_starting_server_is_live_and_not_ready(triton: TritonProcess, engine: ScriptedEngine) -> None:
    engine.may_start.clear()
    with Serving(engine, until_ready=False) as server:
        assert triton.ask(server.target, "is_server_live") is True
        assert triton.ask(server.target, "is_server_ready") is False
        assert triton.ask(server.target, "is_model_ready", model_name="greenroom") is False
        refused = triton.ask(server.target, "infer", model="greenroom", text="x")
        assert refused["status"] == "StatusCode.UNAVAILABLE"
        engine.may_start.set()
        server.wait_ready()
        assert triton.ask(server.target, "is_server_ready") is True


def test_metadata_and_config_name_the_same_tensors(call: Call) -> None:
    server = call("get_server_metadata")
    assert server["name"] == "greenroom"
    assert "model_repository" in server["extensions"]
    metadata = call("get_model_metadata", model_name="greenroom:orders")
    assert (metadata["name"], metadata["versions"], metadata["platform"]) == ("greenroom:orders", ["3"], "greenroom")
    assert metadata["inputs"] == [{"name": "text_input", "datatype": "BYTES", "shape": ["1"]}]
    config = call("get_model_config", model_name="greenroom:orders")["config"]
    assert [tensor["name"] for tensor in config["output"]] == [tensor["name"] for tensor in metadata["outputs"]]
    assert [tensor["dims"] for tensor in config["output"]] == [tensor["shape"] for tensor in metadata["outputs"]]
    assert config["model_transaction_policy"] == {"decoupled": True}


def test_an_inference_gives_the_whole_text_and_what_it_took(call: Call) -> None:
    answer = call("infer", model="greenroom", text="one two three", request_id="7")
    assert answer == {
        "id": "7",
        "model": "greenroom/3",
        "parameters": {"finish_reason": "stop", "prompt_tokens": "7", "completion_tokens": "3"},
        "outputs": {"text_output": ["one two three"]},
    }


def test_outputs_come_in_the_order_in_which_they_were_asked_for(call: Call) -> None:
    answer = call("infer", model="greenroom", text="é b c", outputs=["token_ids", "routing", "text_output"])
    assert list(answer["outputs"]) == ["token_ids", "routing", "text_output"]
    assert answer["outputs"]["token_ids"] == [0, 1, 2]
    assert answer["outputs"]["text_output"] == ["é b c"]
    routing = json.loads(answer["outputs"]["routing"][0])
    assert (routing["task"], routing["how"], routing["margin"], routing["generation"]) == (
        "orders",
        "located",
        0.125,
        3,
    )
    assert routing["scores"][1] == {"task": "dates", "score": 1.125}
    assert routing["experts"][0]["digest"] == DIGEST


def test_explain_adds_the_routing_and_the_weights_per_layer(call: Call) -> None:
    answer = call("infer", model="greenroom", text="a b", parameters={"explain": True})
    assert list(answer["outputs"]) == ["text_output", "routing"]
    layers = [{"layer": 2, "experts": {DIGEST: 0.75}, "groups": {}}]
    assert json.loads(answer["outputs"]["routing"][0])["layers"] == layers
    pieces = call("stream", requests=[{"model": "greenroom", "text": "a", "parameters": {"explain": True}}])
    assert list(pieces[0]["outputs"]) == ["routing"]
    assert json.loads(pieces[-1]["parameters"]["layers"]) == layers
    assert list(call("infer", model="greenroom", text="a", parameters={"explain": False})["outputs"]) == ["text_output"]


def test_a_models_name_pins_the_task(call: Call, engine: ScriptedEngine) -> None:
    answer = call("infer", model="greenroom:dates", text="a b", outputs=["routing"])
    assert json.loads(answer["outputs"]["routing"][0])["how"] == "pinned"
    assert [request.task for request in engine.requests] == ["dates"]


def test_every_parameter_reaches_the_engine(call: Call, engine: ScriptedEngine) -> None:
    wanted = {"task": "dates", "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "seed": 11}
    wanted |= {"min_p": 0.1, "repetition_penalty": 1.5, "presence_penalty": 1, "frequency_penalty": 2, "regex": "a+"}
    call("infer", model="greenroom", text="a b", parameters=wanted, timeout=60_000_000, priority=2)
    call("infer", model="greenroom", text="a b", parameters={"temperature": 1})
    request, second = engine.requests
    sampling = request.sampling
    assert (request.task, sampling.max_tokens, sampling.temperature) == ("dates", 5, 0.5)
    assert (sampling.top_p, sampling.top_k, sampling.seed) == (0.9, 4, 11)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.regex) == (0.1, 1.5, "a+")
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, 2)
    assert request.deadline is not None
    assert (request.priority, request.default_task) == (2, None)
    assert (second.sampling.temperature, second.deadline) == (1.0, None)


@pytest.mark.parametrize(
    ("request_fields", "status", "text"),
    [
        ({"model": "nobody"}, "NOT_FOUND", "no model 'nobody'"),
        ({"model": "greenroom", "model_version": "2"}, "NOT_FOUND", "version 3 alone"),
        ({"model": "greenroom", "parameters": {"colour": "red"}}, "INVALID_ARGUMENT", "parameters.colour"),
        ({"model": "greenroom", "parameters": {"seed": "x"}}, "INVALID_ARGUMENT", "int64_param"),
        ({"model": "greenroom", "parameters": {"top_p": 2.0}}, "INVALID_ARGUMENT", "parameters.top_p=2.0"),
        ({"model": "greenroom", "parameters": {"task": "../x"}}, "INVALID_ARGUMENT", "parameters.task"),
        ({"model": "greenroom:dates", "parameters": {"task": "orders"}}, "INVALID_ARGUMENT", "pins a task already"),
        ({"model": "greenroom", "sequence_id": 4}, "INVALID_ARGUMENT", "parameters.sequence"),
        ({"model": "greenroom", "priority": 200}, "INVALID_ARGUMENT", "priority=200"),
        ({"model": "greenroom", "timeout": 0}, "INVALID_ARGUMENT", "parameters.timeout"),
        ({"model": "greenroom", "timeout": 1}, "DEADLINE_EXCEEDED", ""),
        ({"model": "greenroom", "outputs": ["colour"]}, "INVALID_ARGUMENT", "outputs"),
        ({"model": "greenroom", "datatype": "INT64"}, "INVALID_ARGUMENT", "inputs.datatype"),
        ({"model": "greenroom", "request_id": "x" * 300}, "INVALID_ARGUMENT", "id="),
        ({"model": "greenroom", "text": "refuse task"}, "NOT_FOUND", "no task of this name"),
        ({"model": "greenroom", "text": "refuse input"}, "INVALID_ARGUMENT", "text_input"),
        ({"model": "greenroom", "text": "fail digest"}, "FAILED_PRECONDITION", "the repertoire cannot serve"),
        ({"model": "greenroom", "text": "refuse bug"}, "INTERNAL", "internal error"),
    ],
)
def test_what_cannot_be_answered_has_its_status(
    call: Call, request_fields: dict[str, Any], status: str, text: str
) -> None:
    answer = call("infer", **{"text": "a b", **request_fields})
    assert answer["status"] == f"StatusCode.{status}"
    assert text in answer["error"]
    assert "/" not in answer["error"].replace("../x", "")


def test_answers_of_a_stream_interleave_by_id(triton: TritonProcess, serving: Serving, engine: ScriptedEngine) -> None:
    requests = [
        {"model": "greenroom", "text": "hold b c", "request_id": "slow"},
        {"model": "greenroom:dates", "text": "x y", "request_id": "quick"},
    ]
    triton.send(serving.target, "stream", requests=requests)
    with engine._changed:
        assert engine._changed.wait_for(lambda: len(engine.requests) == 2 and len(engine._live) == 1, 10)
    engine.release()
    pieces = triton.receive()
    assert texts_of(pieces, "slow") == "hold b c"
    assert texts_of(pieces, "quick") == "x y"
    order = [piece["id"] for piece in pieces]
    assert order.index("slow") < order.index("quick") < len(order) - 1 - order[::-1].index("slow")


def test_every_piece_says_whether_it_is_the_last(call: Call) -> None:
    pieces = call("stream", requests=[{"model": "greenroom", "text": "a b", "request_id": "1"}])
    assert [piece["parameters"]["triton_final_response"] for piece in pieces] == [False, False, True]
    assert [piece["outputs"] for piece in pieces] == [{"text_output": [text]} for text in ("a", " b", "")]
    assert pieces[-1]["parameters"]["finish_reason"] == "stop"
    assert pieces[-1]["parameters"]["completion_tokens"] == "2"


def test_the_last_piece_is_empty_on_request(call: Call) -> None:
    request = {"model": "greenroom", "text": "a b", "enable_empty_final_response": True}
    pieces = call("stream", requests=[request])
    assert [piece["parameters"]["triton_final_response"] for piece in pieces] == [False, False, True]
    assert [list(piece["outputs"]) for piece in pieces] == [["text_output"], ["text_output"], []]


def test_a_stream_begins_with_the_routing_on_request(call: Call) -> None:
    request = {"model": "greenroom", "text": "a b", "outputs": ["text_output", "token_ids", "routing"]}
    first, *rest = call("stream", requests=[request])
    assert list(first["outputs"]) == ["routing"]
    assert [piece["outputs"]["token_ids"] for piece in rest] == [[0], [1], []]


def test_a_failed_request_leaves_its_stream_open(call: Call) -> None:
    requests = [
        {"model": "nobody", "text": "x"},
        {"model": "greenroom", "text": "fail digest"},
        {"model": "greenroom", "text": "a b", "request_id": "good"},
    ]
    pieces = call("stream", requests=requests)
    failures = sorted(piece["error"] for piece in pieces if "error" in piece)
    assert [failure.split(":")[0] for failure in failures] == ["DIGEST_MISMATCH", "UNKNOWN_MODEL"]
    assert "/srv/blob" not in failures[0]
    assert texts_of(pieces, "good") == "a b"


def test_a_failed_request_ends_its_stream_where_the_client_asks_for_that(call: Call, engine: ScriptedEngine) -> None:
    requests = [{"model": "greenroom", "text": "hold x"}, {"model": "nobody", "text": "x"}]
    pieces = call("stream", requests=requests, headers={"triton_grpc_error": "true"})
    assert pieces[-1]["status"] == "StatusCode.NOT_FOUND"
    engine.wait_live(0)


def test_a_failed_piece_names_its_request(serving: Serving) -> None:
    with grpc.insecure_channel(serving.target) as channel:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        (piece,) = stub.ModelStreamInfer(iter([pb.ModelInferRequest(model_name="nobody", id="9")]), timeout=20)
    assert piece.infer_response.id == "9"
    assert piece.infer_response.parameters["triton_final_response"].bool_param


def test_a_client_that_leaves_a_stream_cancels_its_requests(serving: Serving, engine: ScriptedEngine) -> None:
    tensor = pb.ModelInferRequest.InferInputTensor(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(b"hold b c")
    message = pb.ModelInferRequest(model_name="greenroom", inputs=[tensor])
    with grpc.insecure_channel(serving.target) as channel:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        pieces = stub.ModelStreamInfer(iter([message, message]), timeout=20)
        next(pieces)
        engine.wait_live(2)
        pieces.cancel()
        engine.wait_live(0)
    assert len(engine.cancelled) == 2


def test_the_index_lists_the_repertoire_and_its_tasks(call: Call) -> None:
    models = call("get_model_repository_index")["models"]
    assert [model["name"] for model in models] == ["greenroom", "greenroom:dates", "greenroom:orders"]
    assert {(model["version"], model["state"]) for model in models} == {("3", "READY")}


def test_an_unloaded_model_refuses_until_it_is_loaded(guarded: Call, engine: ScriptedEngine) -> None:
    assert guarded("unload_model", model_name="greenroom:dates") is None
    state = guarded("get_model_repository_index")["models"][1]
    assert (state["state"], state["reason"]) == ("UNAVAILABLE", "unloaded by a client")
    assert guarded("is_model_ready", model_name="greenroom:dates") is False
    assert guarded("infer", model="greenroom:dates", text="x")["status"] == "StatusCode.UNAVAILABLE"
    assert texts_of([guarded("infer", model="greenroom:orders", text="x")], "") == "x"
    assert guarded("load_model", model_name="greenroom:dates") is None
    assert engine.requests[-1].task == "dates"
    assert texts_of([guarded("infer", model="greenroom:dates", text="x")], "") == "x"


def test_models_come_from_the_repertoire_alone(guarded: Call) -> None:
    assert guarded("load_model", model_name="other")["status"] == "StatusCode.NOT_FOUND"
    assert guarded("unload_model", model_name="greenroom:")["status"] == "StatusCode.NOT_FOUND"
    assert guarded("load_model", model_name="greenroom", config="{}")["status"] == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.parametrize("name", ["load_model", "unload_model"])
def test_loading_and_unloading_need_the_scope_admin(call: Call, guarded: Call, name: str) -> None:
    assert call(name, model_name="greenroom")["status"] == "StatusCode.PERMISSION_DENIED"
    user = {"authorization": f"Bearer {USER}"}
    assert guarded(name, model_name="greenroom", headers=user)["status"] == "StatusCode.PERMISSION_DENIED"
    assert guarded("is_server_live", headers={})["status"] == "StatusCode.UNAUTHENTICATED"


def test_requests_of_a_stream_count_for_their_tenants_quota(guarded: Call, engine: ScriptedEngine) -> None:
    user = {"authorization": f"Bearer {USER}"}
    requests = [{"model": "greenroom", "text": "hold on"}, {"model": "greenroom", "text": "a"}]
    refused = guarded("stream", requests=requests, headers={**user, "triton_grpc_error": "true"})[-1]
    assert refused["status"] == "StatusCode.RESOURCE_EXHAUSTED"
    engine.wait_live(0)
    (answer, *_) = guarded("stream", requests=requests[1:], headers=user)
    assert answer["outputs"] == {"text_output": ["a"]}


def test_a_request_names_its_own_tenant_or_none(guarded: Call) -> None:
    user = {"authorization": f"Bearer {USER}"}
    own = guarded("infer", model="greenroom", text="a", headers=user, parameters={"tenant": "user"})
    assert own["outputs"] == {"text_output": ["a"]}
    other = guarded("infer", model="greenroom", text="a", headers=user, parameters={"tenant": "boss"})
    assert other["status"] == "StatusCode.PERMISSION_DENIED"


def test_statistics_count_what_was_answered_and_what_was_not(call: Call) -> None:
    for text in ("a", "b", "fail digest"):
        call("infer", model="greenroom:dates", text=text)
    (dates,) = call("get_inference_statistics", model_name="greenroom:dates")["model_stats"]
    assert (dates["inference_count"], dates["inference_stats"]["fail"]["count"]) == ("2", "1")
    assert dates["inference_stats"]["queue"] == {"count": "2", "ns": "1000000000"}
    assert dates["inference_stats"]["compute_input"] == {"count": "2", "ns": "500000000"}
    assert dates["inference_stats"]["compute_infer"] == {"count": "2", "ns": "3500000000"}
    assert int(dates["last_inference"]) > 0
    every = call("get_inference_statistics")["model_stats"]
    assert [(model["name"], model.get("inference_count", "0")) for model in every] == [
        ("greenroom", "0"),
        ("greenroom:dates", "2"),
        ("greenroom:orders", "0"),
    ]


def test_shared_memory_is_not_implemented(call: Call) -> None:
    for name in ("get_system_shared_memory_status", "get_cuda_shared_memory_status"):
        assert call(name)["status"] == "StatusCode.UNIMPLEMENTED"
