"""The OpenAI batch file format: requests as lines in, responses and errors as lines out.

It knows nothing of HTTP.
Read first: `/v1/chat/completions` with one user message and `/v1/completions` with one prompt are answered. `model`
pins a task, as `greenroom:TASK` or by its name alone; the repertoire's own name, "greenroom", lets the locator decide.
Fields that would change the answer and that are not computed make the row bad; none is passed over. Times in responses
are 0, so that the same input gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.batch.rows import Answer, BadRow, Content, Location, Prompt, make_prompt
from runtime.errors import InvalidInputError

LOCATED_MODEL = "greenroom"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
_SAMPLING = ("temperature", "top_p", "seed")
_LENGTHS = ("max_tokens", "max_completion_tokens")
_KNOWN = {"model", "stop", "n", "stream", "user", "metadata", *_SAMPLING, *_LENGTHS}


def prompt_of_request(line: int, content: Content, sampling: Mapping[str, Any]) -> Prompt:
    """Check a request line and take out of it what an engine needs.

    Raises:
        InvalidInputError: a field is missing, wrong, or not computed here; named as in the file.
    """
    url, body = _envelope(content)
    for name in body:
        if name not in {*_KNOWN, "messages" if url == CHAT else "prompt"} and body[name] is not None:
            raise InvalidInputError(f"body.{name}", body[name], "is not computed here")
    for name, only in (("n", 1), ("stream", False)):
        if body.get(name) not in (None, only):
            raise InvalidInputError(f"body.{name}", body[name], f"must be {only}")
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidInputError("body.model", model, f"must be the name of a task, or {LOCATED_MODEL}")
    text = _message(body) if url == CHAT else _text(body)
    task = None if model == LOCATED_MODEL else model.removeprefix(f"{LOCATED_MODEL}:")
    return make_prompt(line, text, task, {**sampling, **_sampling(body)})


def _envelope(content: Content) -> tuple[str, Content]:
    custom_id, url, body = (content.get(name) for name in ("custom_id", "url", "body"))
    if not isinstance(custom_id, str) or not custom_id:
        raise InvalidInputError("custom_id", custom_id, "must be text")
    if content.get("method") != "POST":
        raise InvalidInputError("method", content.get("method"), "must be POST")
    if url not in (CHAT, TEXT):
        raise InvalidInputError("url", url, f"is {CHAT} or {TEXT}")
    if not isinstance(body, dict):
        raise InvalidInputError("body", body, "must be a JSON object")
    return str(url), body


def _sampling(body: Content) -> Content:
    own: Content = {name: body[name] for name in _SAMPLING if body.get(name) is not None}
    for name in _LENGTHS:
        if body.get(name) is not None:
            own["max_tokens"] = body[name]
    if body.get("stop") is not None:
        own["stop"] = (body["stop"],) if isinstance(body["stop"], str) else tuple(body["stop"])
    _check_types(own)
    return own


def response(content: Content, location: Location, answer: Answer, generation: int) -> Content:
    """The output line of an answered request."""
    chat = content["url"] == CHAT
    choice: Content = {"index": 0, "finish_reason": answer.finish_reason, "logprobs": None}
    choice |= {"message": {"role": "assistant", "content": answer.text}} if chat else {"text": answer.text}
    name = f"batch_req_{answer.line}"
    body: Content = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{answer.line}",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": location.task or LOCATED_MODEL,
        "choices": [choice],
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        },
        "system_fingerprint": f"generation-{generation}",
    }
    reply = {"status_code": 200, "request_id": name, "body": body}
    return {"id": name, "custom_id": content["custom_id"], "response": reply, "error": None}


def error_line(bad: BadRow, content: Content) -> Content:
    """The line of a request that was left out."""
    error = {"code": bad.reason, "message": bad.problem, "param": bad.field or None, "line": bad.line}
    return {"id": f"batch_req_{bad.line}", "custom_id": content.get("custom_id"), "response": None, "error": error}


def _check_types(own: Content) -> None:
    kinds: dict[str, Any] = {"max_tokens": int, "seed": int, "temperature": (int, float), "top_p": (int, float)}
    for name, kind in kinds.items():
        if name in own and (not isinstance(own[name], kind) or isinstance(own[name], bool)):
            raise InvalidInputError(f"body.{name}", own[name], "must be a number")
    for text in own.get("stop", ()):
        if not isinstance(text, str):
            raise InvalidInputError("body.stop", text, "must be text, or a list of texts")


def _message(body: Content) -> str:
    messages = body.get("messages")
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], dict):
        raise InvalidInputError("body.messages", messages, "must be a list of one message")
    message = messages[0]
    if message.get("role") != "user":
        raise InvalidInputError("body.messages[0].role", message.get("role"), "must be user")
    if not isinstance(message.get("content"), str) or not message["content"]:
        raise InvalidInputError("body.messages[0].content", message.get("content"), "must be text")
    return str(message["content"])


def _text(body: Content) -> str:
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise InvalidInputError("body.prompt", prompt, "must be text")
    return prompt
