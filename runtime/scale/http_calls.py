"""OpenAI completions at a cluster's HTTP entry: a body in, one JSON answer out.

It knows nothing of sockets or replicas.
Read first: what is taken and refused is what the OpenAI batch file format takes (`runtime.batch.openai_rows`); an
answer comes whole. Streams are had over gRPC, or from a server of one machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from google.rpc import code_pb2  # type: ignore[import-untyped]

from greenroom.pb.greenroom.v1 import greenroom_pb2 as pb
from runtime.batch.openai_rows import prompt_of_request, response
from runtime.batch.rows import Answer, Location
from runtime.errors import InvalidInputError

_STATUS = {
    code_pb2.INVALID_ARGUMENT: 400,
    code_pb2.NOT_FOUND: 404,
    code_pb2.RESOURCE_EXHAUSTED: 429,
    code_pb2.UNAVAILABLE: 503,
    code_pb2.DEADLINE_EXCEEDED: 504,
}
_REASONS = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}


def generate_request(method: str, path: str, body: bytes) -> pb.GenerateRequest:
    """The request that an HTTP call makes.

    Raises:
        InvalidInputError: another method or path, no JSON, or a field that cannot be used.
    """
    try:
        fields = json.loads(body or b"{}")
    except ValueError as error:
        raise InvalidInputError("body", body[:80], f"is not JSON: {error}") from error
    prompt = prompt_of_request(0, {"custom_id": "http", "method": method, "url": path, "body": fields}, {})
    sampling = prompt.sampling
    message = pb.GenerateRequest(input=prompt.text)
    if prompt.task is not None:
        message.task = prompt.task
    given = {name: getattr(sampling, name) for name in ("max_tokens", "temperature", "top_p")}
    message.sampling.CopyFrom(pb.Sampling(**given, stop=sampling.stop))
    if fields.get("seed") is not None:
        message.sampling.seed = fields["seed"]
    return message


def answered(path: str, events: Sequence[pb.GenerateResponse]) -> dict[str, Any]:
    """The body of an answer."""
    routing, done = events[0].routing, events[-1].done
    answer = Answer(
        line=0,
        text="".join(event.delta.text for event in events),
        prompt_tokens=done.usage.prompt_tokens,
        completion_tokens=done.usage.completion_tokens,
        finish_reason=_REASONS[done.finish_reason],
    )
    location = Location(line=0, task=routing.task or None, how="located", margin=routing.margin)
    content = {"custom_id": "http", "url": path}
    body: dict[str, Any] = response(content, location, answer, routing.generation)["response"]["body"]
    return {**body, "id": routing.request_id, "created": int(time.time())}


def failed(status: Any) -> tuple[int, dict[str, Any]]:  # noqa: ANN401 - protobuf without types
    """HTTP status and body of a `google.rpc.Status`."""
    return _STATUS.get(status.code, 500), {"error": {"message": status.message, "code": status.code}}
