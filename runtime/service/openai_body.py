"""What OpenAI's clients send, as far as it is understood here: every other field is refused by its name.

It knows nothing of calls or of how answers look.
Read first: fields that are not set take the server's defaults, which are those of `greenroom.v1`; `top_k`, `min_p`,
`repetition_penalty`, `regex`, `ignore_eos`, `base_only`, `task_weights`, `default_task`, `abstain_fails`,
`priority` and `explain` are ours.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.errors import InvalidInputError

MAX_MESSAGES = 256
MAX_PARTS = 64


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Part):
    """`stream_options`."""

    include_usage: bool = False


class TextPart(_Part):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(_Part):
    """One message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)]

    @property
    def text(self) -> str:
        """All parts as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class JsonSchema(_Part):
    """`response_format.json_schema`; every schema is followed strictly."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(_Part):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Body(_Part):
    """What both kinds of completion have."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    regex: str | None = None
    ignore_eos: bool | None = None
    base_only: bool = False
    task_weights: dict[str, float] | None = None
    default_task: str | None = None
    abstain_fails: bool = False
    priority: int = 0
    explain: bool = False

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(Body):
    """`POST /v1/completions`; the prompt is the whole prompt as the model sees it."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    logprobs: int | None = None


class ChatBody(Body):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None


AnyBody = TypeVar("AnyBody", CompletionBody, ChatBody)


def parse(kind: type[AnyBody], content: bytes) -> AnyBody:
    """A body of a kind.

    Raises:
        InvalidInputError: it is no JSON, or a field is unknown, missing or of the wrong type.
    """
    try:
        body = kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]

        field = ".".join(str(part) for part in first["loc"]) or "body"
        value = "set" if first["type"] == "extra_forbidden" else str(first.get("input", ""))[:80]
        problem = "is not supported here" if first["type"] == "extra_forbidden" else first["msg"]
        raise InvalidInputError(field, value, problem) from error
    if body.stream_options is not None and not body.stream:
        raise InvalidInputError("stream_options", "set", "means nothing without stream")
    return body
