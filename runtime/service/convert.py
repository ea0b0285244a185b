"""From protobuf to the engine's words: requests are checked here, field by field.

It knows nothing of calls, threads or statuses: every function is pure; `runtime.service.replies` is the way back.
Read first: every field of a request is used or refused; errors name the field as it is called on the wire.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from google.protobuf.message import Message as AnyMessage
from google.protobuf.unknown_fields import UnknownFieldSet

from greenroom.pb.greenroom.v1 import greenroom_pb2 as pb
from runtime.engine.request import Request, SamplingParams
from runtime.errors import InvalidInputError
from runtime.model.names import check_name
from runtime.model.turns import Message

MAX_PROMPT_CHARS = 1_000_000
"""Bounds the work of tokenising before the engine can refuse a prompt for its length in tokens."""

MAX_GROUPS = 256

Asked = pb.GenerateRequest | pb.ScoreRequest | pb.LocateRequest

_ROLE: dict[int, Any] = {pb.ROLE_SYSTEM: "system", pb.ROLE_USER: "user", pb.ROLE_ASSISTANT: "assistant"}
_SAMPLING = pb.Sampling.DESCRIPTOR.fields_by_name


def engine_request(message: Asked, *, request_id: str, deadline: float | None, tenant: str = "") -> Request:
    """The engine's request for a `GenerateRequest`, `ScoreRequest` or `LocateRequest`.

    Args:
        message: as it came.
        request_id: the request's name, already checked.
        deadline: absolute, on the clock of `time.monotonic()`; None for none.
        tenant: of the caller, for requests that name none.

    Raises:
        InvalidInputError: a field that is missing, unknown or out of range.
    """
    reject_unknown(message)
    fields: dict[str, Any] = {**_prompt(message), "locate_only": isinstance(message, pb.LocateRequest)}
    if not isinstance(message, pb.LocateRequest):
        fields |= _route(message)
    if isinstance(message, pb.GenerateRequest):
        fields["sampling"] = _sampling(message.sampling)
    if isinstance(message, pb.ScoreRequest):
        if len(message.continuation) > MAX_PROMPT_CHARS:
            raise InvalidInputError("continuation", message.continuation, f"has at most {MAX_PROMPT_CHARS} characters")
        fields["continuation"] = message.continuation
    if message.tenant:
        tenant = check_name("tenant", message.tenant)
    try:
        return Request(request_id=request_id, deadline=deadline, priority=message.priority, tenant=tenant, **fields)
    except InvalidInputError as error:
        raise on_the_wire(error, message) from error


def reject_unknown(message: AnyMessage, path: str = "") -> None:
    """Refuse fields that a newer client set and this server would ignore.

    Raises:
        InvalidInputError: there is one; it is named by its number.
    """
    unknown = UnknownFieldSet(message)
    if len(unknown) > 0:
        number = unknown[0].field_number
        raise InvalidInputError(f"{path}{number}", "set", "this server knows no field of this number")
    for descriptor, value in message.ListFields():
        if isinstance(value, AnyMessage):
            reject_unknown(value, f"{path}{descriptor.name}.")
        elif descriptor.message_type is not None and not isinstance(value, dict):
            for place, item in enumerate(_messages(value)):
                reject_unknown(item, f"{path}{descriptor.name}[{place}].")


def on_the_wire(error: InvalidInputError, message: Asked) -> InvalidInputError:
    """The same error, naming the field of `message` instead of the engine's."""
    if error.field in {"text", "input"}:
        field = message.WhichOneof("prompt") or "input"
        return InvalidInputError(field, getattr(message, field), error.problem)
    if error.field.startswith("messages"):
        return InvalidInputError(f"chat.{error.field}", message.chat.messages, error.problem)
    if isinstance(message, pb.GenerateRequest) and error.field in _SAMPLING:
        return _in_sampling(error, message.sampling)
    return error


def _messages(value: Any) -> Iterable[AnyMessage]:  # noqa: ANN401 - a repeated field or a map of any type
    values = value.values() if hasattr(value, "values") else value
    return (item for item in values if isinstance(item, AnyMessage))


def _prompt(message: Asked) -> dict[str, Any]:
    """Fields of the engine's request that say what is asked."""
    field = message.WhichOneof("prompt")
    if field is None:
        raise InvalidInputError("input", "", "input, raw_prompt or chat is required")
    if field == "chat":
        return {"messages": _chat(message.chat)}
    text = getattr(message, field)
    if not 0 < len(text) <= MAX_PROMPT_CHARS:
        raise InvalidInputError(field, text, f"must have 1 to {MAX_PROMPT_CHARS} characters, has {len(text)}")
    return {"text": text, "raw": field == "raw_prompt"}


def _chat(chat: pb.Chat) -> tuple[Message, ...]:
    if not chat.messages:
        raise InvalidInputError("chat.messages", 0, "must not be empty")
    num_chars = sum(len(message.content) for message in chat.messages)
    if num_chars > MAX_PROMPT_CHARS:
        raise InvalidInputError("chat.messages", num_chars, f"at most {MAX_PROMPT_CHARS} characters in all")
    for place, message in enumerate(chat.messages):
        if message.role not in _ROLE:
            raise InvalidInputError(f"chat.messages[{place}].role", message.role, "is not a role")
    return tuple(Message(_ROLE[message.role], message.content) for message in chat.messages)


def _route(message: pb.GenerateRequest | pb.ScoreRequest) -> dict[str, Any]:
    """Fields of the engine's request that say who answers."""
    for field in ("group_bias", "group_mask"):
        if len(getattr(message, field)) > MAX_GROUPS:
            raise InvalidInputError(field, len(getattr(message, field)), f"at most {MAX_GROUPS} groups")
    route, otherwise = message.WhichOneof("route"), message.WhichOneof("on_abstain")
    return {
        "task": check_name("task", message.task) if route == "task" else None,
        "task_weights": {check_name("task_weights", task): weight for task, weight in message.task_weights.items()},
        "base_only": route == "base_only" and message.base_only,
        "abstain_fails": otherwise == "abstain_fails" and message.abstain_fails,
        "default_task": check_name("default_task", message.default_task) if otherwise == "default_task" else None,
        "group_bias": dict(message.group_bias),
        "group_mask": frozenset(message.group_mask),
        "explain": message.explain,
    }


def _sampling(message: pb.Sampling) -> SamplingParams:
    """What the client set, over the engine's defaults."""
    chosen = {
        name: getattr(message, name)
        for name, field in _SAMPLING.items()
        if field.has_presence and message.HasField(name)
    }
    try:
        return SamplingParams(stop=tuple(message.stop), ignore_eos=message.ignore_eos, **chosen)
    except InvalidInputError as error:
        raise _in_sampling(error, message) from error


def _in_sampling(error: InvalidInputError, message: pb.Sampling) -> InvalidInputError:
    return InvalidInputError(f"sampling.{error.field}", getattr(message, error.field), error.problem)
