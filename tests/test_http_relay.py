"""What a relayed response does when the replica that answers it is lost midway."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from runtime.scale.http_relay import Message, Relayed


class ReplicaLostError(Exception):
    """Stands for what a cluster raises."""


async def _cut_short() -> AsyncIterator[Message]:
    yield {"type": "http.response.body", "body": b"half", "more_body": True}
    raise ReplicaLostError


def _relay(content_type: bytes, sent: list[Message]) -> None:
    start: Message = {"type": "http.response.start", "status": 200, "headers": [(b"Content-Type", content_type)]}

    async def send(message: Message) -> None:
        sent.append(message)

    def lost(error: Exception) -> dict[str, Any]:
        return {"error": {"message": type(error).__name__}}

    asyncio.run(Relayed(start, _cut_short(), lost)({}, None, send))


def test_a_stream_of_events_that_is_cut_ends_with_an_error_event() -> None:
    sent: list[Message] = []
    _relay(b"text/event-stream; charset=utf-8", sent)
    assert [message["type"] for message in sent] == ["http.response.start", *["http.response.body"] * 2]
    assert not sent[-1].get("more_body", False)
    assert sent[-1]["body"].startswith(b"data: ")
    assert json.loads(sent[-1]["body"].removeprefix(b"data: ")) == {"error": {"message": "ReplicaLostError"}}


def test_a_json_answer_that_is_cut_is_not_ended_as_if_it_were_whole() -> None:
    sent: list[Message] = []
    with pytest.raises(ReplicaLostError):
        _relay(b"application/json", sent)
    assert sent[-1] == {"type": "http.response.body", "body": b"half", "more_body": True}
