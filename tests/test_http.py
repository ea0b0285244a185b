"""The HTTP front end as a platform sees it: health, readiness, metrics, and requests that no real client sends.

It does not know models: the engine plays a script.
Read first: everything goes over real connections with the standard library's client.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from scripted_engine import ScriptedEngine
from serving import LIMIT_S, Serving

from runtime.errors import InvalidInputError
from runtime.service.guard import Guard
from runtime.service.http_front import HttpFront
from runtime.service.tokens import TokenEntry, Tokens, digest_of, new_secret


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def serving(engine: ScriptedEngine) -> Iterator[Serving]:
    with Serving(engine, http=True) as server:
        yield server


def ask(serving: Serving, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, Any]:
    connection = http.client.HTTPConnection(urlsplit(serving.url).netloc, timeout=LIMIT_S)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    is_json = (response.getheader("content-type") or "").startswith("application/json")
    return response.status, json.loads(content) if is_json else content.decode(), response.headers


def complete(serving: Serving, body: bytes, content_type: str = "application/json") -> tuple[int, Any]:
    status, answer, _ = ask(serving, "POST", "/v1/completions", body, content_type=content_type)
    return status, answer.get("error", answer)


def test_health_and_readiness_follow_the_server(engine: ScriptedEngine) -> None:
    engine.may_start.clear()
    with Serving(engine, http=True, until_ready=False) as serving:
        assert ask(serving, "GET", "/health")[0] == 200
        assert ask(serving, "GET", "/ready")[:2] == (503, {"ready": False})
        status, error = complete(serving, b'{"model": "greenroom", "prompt": "a"}')
        assert (status, error["code"]) == (503, "UNAVAILABLE")
        engine.may_start.set()
        serving.wait_ready()
        assert ask(serving, "GET", "/ready")[:2] == (200, {"ready": True})


def test_metrics_tell_of_http_and_grpc_alike(serving: Serving) -> None:
    complete(serving, b'{"model": "greenroom", "prompt": "a b"}')
    status, text, headers = ask(serving, "GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    assert 'grpc_server_handled_total{grpc_code="OK",grpc_method="Completions"' in text
    assert 'greenroom_located_total{how="located",task="orders"} 1.0' in text


def test_metrics_and_models_need_a_token_where_tokens_are_configured(engine: ScriptedEngine) -> None:
    secret = new_secret()
    entry = TokenEntry(name="user", sha256=digest_of(secret), scopes=["infer"])
    with Serving(engine, http=True, guard=Guard.of(Tokens([entry], []))) as serving:
        for path in ("/metrics", "/v1/models"):
            assert ask(serving, "GET", path)[0] == 401
            assert ask(serving, "GET", path, authorization=f"Bearer {secret}")[0] == 200
        assert ask(serving, "GET", "/health")[0] == ask(serving, "GET", "/ready")[0] == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"[]", "body"),
        (b'{"model": "greenroom"}', "prompt"),
        (b'{"prompt": "a"}', "model"),
        (b'{"model": "greenroom", "prompt": ""}', "prompt"),
        (b'{"model": "greenroom", "prompt": "\\ud800"}', "body"),
        (b'{"model": "greenroom", "prompt": [1, 2]}', "prompt.str"),
        (b'{"model": "greenroom", "prompt": "a", "seed": 1e400}', "seed"),
        (b'{"model": "greenroom", "prompt": "a", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}", "body"),
    ],
)
def test_a_body_that_is_none_is_refused(serving: Serving, body: bytes, param: str) -> None:
    status, error = complete(serving, body)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)


def test_a_body_must_say_that_it_is_json(serving: Serving, engine: ScriptedEngine) -> None:
    status, error = complete(serving, b'{"model": "greenroom", "prompt": "a"}', content_type="text/plain")
    assert (status, error["param"]) == (400, "content-type")
    assert engine.requests == []


def test_a_body_that_is_too_long_is_refused(serving: Serving) -> None:
    status, error = complete(serving, b'{"model": "' + b"x" * (16 << 20) + b'"}')
    assert (status, error["param"]) == (400, "body")


def test_an_unknown_path_and_a_wrong_method_have_error_objects_too(serving: Serving) -> None:
    status, answer, _ = ask(serving, "GET", "/v1/embeddings")
    assert (status, answer["error"]["code"]) == (404, "NOT_FOUND")
    status, answer, _ = ask(serving, "GET", "/v1/completions")
    assert (status, answer["error"]["param"]) == (405, "method")


def test_a_request_id_that_cannot_be_used_is_refused(serving: Serving) -> None:
    status, answer, headers = ask(serving, "GET", "/v1/models", x_request_id="a b")
    assert (status, answer["error"]["param"]) == (400, "x-request-id")
    assert headers["x-request-id"] != "a b"


def test_the_routes_describe_themselves(serving: Serving) -> None:
    _, answer, _ = ask(serving, "GET", "/openapi.json")
    assert "/v1/chat/completions" in answer["paths"]


def test_a_client_that_leaves_before_its_answer_cancels_it(serving: Serving, engine: ScriptedEngine) -> None:
    body = b'{"model": "greenroom", "prompt": "hold b"}'
    host, port = urlsplit(serving.url).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=LIMIT_S) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        connection.sendall(f"{head}\r\n\r\n".encode() + body)
        engine.wait_live(1)
    engine.wait_cancelled()


def test_draining_ends_what_runs_and_refuses_what_comes(serving: Serving, engine: ScriptedEngine) -> None:
    connection = http.client.HTTPConnection(urlsplit(serving.url).netloc, timeout=LIMIT_S)
    body = b'{"model": "greenroom", "prompt": "hold b", "stream": true}'
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    stopped = serving.begin_stop()
    engine.wait_refusing()
    assert ask(serving, "GET", "/ready")[0] == 503
    assert complete(serving, b'{"model": "greenroom", "prompt": "a"}')[0] == 503
    engine.release()
    assert response.read().endswith(b"data: [DONE]\n\n")
    stopped.result(LIMIT_S)
    connection.close()


def test_a_port_in_use_is_refused_by_its_name(serving: Serving) -> None:
    port = urlsplit(serving.url).port
    assert port is not None
    front = HttpFront(serving.server, Guard(), host="127.0.0.1", port=port)

    with pytest.raises(InvalidInputError, match=r"http\.port"):
        asyncio.run(front.start())
