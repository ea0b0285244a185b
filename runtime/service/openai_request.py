"""From what OpenAI's clients send to the engine's request.

It knows nothing of calls or of how answers look.
Read first: errors name the field as the client knows it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from runtime.engine.request import Request, SamplingParams
from runtime.errors import InvalidInputError
from runtime.model.names import check_name
from runtime.model.turns import Message
from runtime.service.convert import MAX_PROMPT_CHARS
from runtime.service.openai_body import ChatBody

if TYPE_CHECKING:
    from runtime.service.models import Model
    from runtime.service.openai_body import CompletionBody, ResponseFormat

_SAME = (
    "temperature",
    "top_p",
    "n",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "top_k",
    "min_p",
    "repetition_penalty",
    "regex",
    "ignore_eos",
)
_ANY_OBJECT = '{"type": "object"}'


def engine_request(body: ChatBody | CompletionBody, model: Model, *, request_id: str, tenant: str) -> Request:
    """The engine's request.

    Args:
        body: as it came.
        model: that it names.
        request_id: already checked.
        tenant: of the caller.

    Raises:
        InvalidInputError: a value that cannot be used.
    """
    if body.base_only and model.task is not None:
        raise InvalidInputError("base_only", body.base_only, f"the model's name {model.name!r} pins a task")
    if body.task_weights and model.task is not None:
        raise InvalidInputError("task_weights", body.task_weights, f"the model's name {model.name!r} pins a task")
    said: dict[str, Any] = (
        {"messages": _messages(body)} if isinstance(body, ChatBody) else {"text": _prompt(body), "raw": True}
    )
    try:
        return Request(
            request_id=request_id,
            task=model.task,
            base_only=body.base_only,
            task_weights={check_name("task_weights", task): share for task, share in (body.task_weights or {}).items()},
            default_task=None if body.default_task is None else check_name("default_task", body.default_task),
            abstain_fails=body.abstain_fails,
            priority=body.priority,
            tenant=tenant,
            explain=body.explain,
            sampling=_sampling(body),
            **said,
        )
    except InvalidInputError as error:
        raise on_the_wire(error, body) from error


def field_of(engine_field: str, body: ChatBody | CompletionBody) -> str:
    """What the client calls a field of the engine."""
    chat = isinstance(body, ChatBody)
    names = {
        "text": "messages" if chat else "prompt",
        "input": "messages" if chat else "prompt",
        "logprobs": "top_logprobs" if chat else "logprobs",
        "max_tokens": "max_completion_tokens" if chat and body.max_tokens is None else "max_tokens",
        "json_schema": "response_format",
    }
    return names.get(engine_field, engine_field)


def on_the_wire(error: InvalidInputError, body: ChatBody | CompletionBody) -> InvalidInputError:
    """The same error, naming the client's field."""
    field = field_of(error.field, body)
    return InvalidInputError(field, getattr(body, field, ""), error.problem)


def _prompt(body: CompletionBody) -> str:
    text = body.prompt if isinstance(body.prompt, str) else body.prompt[0]
    return _checked("prompt", text)


def _messages(body: ChatBody) -> tuple[Message, ...]:
    _checked("messages", "".join(message.text for message in body.messages))
    # OpenAI's newer name of the same role.
    return tuple(
        Message("system" if message.role == "developer" else message.role, message.text) for message in body.messages
    )


def _checked(field: str, text: str) -> str:
    if not 0 < len(text) <= MAX_PROMPT_CHARS:
        raise InvalidInputError(field, text, f"must have 1 to {MAX_PROMPT_CHARS} characters, has {len(text)}")
    return text


def _sampling(body: ChatBody | CompletionBody) -> SamplingParams:
    chosen: dict[str, Any] = {name: getattr(body, name) for name in _SAME if getattr(body, name) is not None}
    chosen["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    chosen["logprobs"] = body.logprobs
    if body.max_tokens is not None:
        chosen["max_tokens"] = body.max_tokens
    if isinstance(body, ChatBody):
        chosen |= _of_chat(body)
    return SamplingParams(**chosen)


def _of_chat(body: ChatBody) -> dict[str, Any]:
    chosen: dict[str, Any] = {"logprobs": (body.top_logprobs or 0) if body.logprobs else None}
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidInputError("top_logprobs", body.top_logprobs, "means nothing without logprobs")
    if body.max_completion_tokens is not None:
        if body.max_tokens is not None:
            raise InvalidInputError("max_tokens", body.max_tokens, "is the old name of max_completion_tokens: set one")
        chosen["max_tokens"] = body.max_completion_tokens
    schema = _schema(body.response_format) if body.response_format is not None else None
    return chosen if schema is None else {**chosen, "json_schema": schema}


def _schema(wanted: ResponseFormat) -> str | None:
    if (wanted.type == "json_schema") != (wanted.json_schema is not None):
        raise InvalidInputError("response_format", wanted.type, "json_schema is for the type json_schema alone")
    if wanted.json_schema is not None:
        return json.dumps(wanted.json_schema.schema_)
    return _ANY_OBJECT if wanted.type == "json_object" else None
