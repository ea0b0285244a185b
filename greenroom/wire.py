"""Between the client's words and protobuf: requests are built here, responses parsed, for both clients.

It knows nothing of channels or calls: every function is pure.
Read first: an option that is left out is left out on the wire too, so the server's defaults are written in one place.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import grpc

from greenroom import results
from greenroom.client_errors import FieldViolation, InternalError, InvalidRequestError
from greenroom.pb.greenroom.v1 import greenroom_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Word = TypeVar("Word")

_HOW: dict[int, results.How] = {
    pb.HOW_LOCATED: "located",
    pb.HOW_PINNED: "pinned",
    pb.HOW_ABSTAINED: "abstained",
    pb.HOW_BASE: "base",
}
_SOURCE: dict[int, results.Source] = {pb.SOURCE_HOST: "host", pb.SOURCE_DISK: "disk"}
_FINISH: dict[int, results.FinishReason] = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}


class GenerateOptions(TypedDict, total=False):
    """Options of `generate` and `stream`; what is left out is the server's default.

    task: pin this task; base_only: the plain base model; raw: the text is the whole prompt, without template.
    max_tokens, temperature (0 is greedy), top_p, top_k (0 is all), min_p, repetition_penalty, presence_penalty,
    frequency_penalty, seed, stop (strings), ignore_eos: sampling.
    n: so many answers, see `Answer.choices`; logprobs: with log-probabilities and so many alternatives.
    json_schema (a schema as text or as a mapping), regex: what the answer may be; one of them.
    request_id: names the request, [A-Za-z0-9._:-]{1,128}; the server makes one otherwise.
    """

    task: str | None
    base_only: bool
    raw: bool
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    n: int | None
    logprobs: int | None
    json_schema: str | Mapping[str, Any] | None
    regex: str | None
    stop: Sequence[str]
    ignore_eos: bool
    request_id: str


def generate_request(text: str, options: GenerateOptions) -> pb.GenerateRequest:
    """The message for one prompt.

    Raises:
        InvalidRequestError: an option that the wire cannot carry, or both `task` and `base_only`.
        TypeError: an option that does not exist.
    """
    unknown = options.keys() - GenerateOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    if options.get("base_only") and options.get("task") is not None:
        raise _refused("task", "cannot be pinned together with base_only")
    if isinstance(options.get("stop"), str):
        raise _refused("sampling.stop", "a sequence of strings, not one string")
    message = pb.GenerateRequest()
    _assign(message, "raw_prompt" if options.get("raw") else "input", text)
    _assign(message, "request_id", options.get("request_id"))
    _assign(message, "task", options.get("task"))
    _assign(message, "base_only", options.get("base_only") or None)
    sampling = pb.Sampling()
    if options.get("json_schema") is not None and options.get("regex") is not None:
        raise _refused("sampling.regex", "excludes json_schema")
    for name in pb.Sampling.DESCRIPTOR.fields_by_name:
        value = options.get(name)
        if name == "json_schema" and value is not None and not isinstance(value, str):
            value = _as_json(value)
        _assign(sampling, name, value, path=f"sampling.{name}")
    if sampling.ListFields():
        message.sampling.CopyFrom(sampling)
    return message


def locate_request(text: str, *, raw: bool, request_id: str) -> pb.LocateRequest:
    """The message that asks where one prompt belongs."""
    message = pb.LocateRequest()
    _assign(message, "raw_prompt" if raw else "input", text)
    _assign(message, "request_id", request_id)
    return message


def event(message: pb.GenerateResponse) -> results.StreamEvent:
    """One event of a stream.

    Raises:
        InternalError: an event that this client does not know.
    """
    match message.WhichOneof("event"):
        case "routing":
            return routing(message.routing)
        case "delta":
            delta = message.delta
            logprobs = tuple(_token_logprob(item) for item in delta.logprobs)
            return results.Delta(delta.text, tuple(delta.token_ids), delta.choice, logprobs)
        case "done":
            done = message.done
            return results.Done(
                finish_reason=_known(_FINISH, done.finish_reason, "finish_reason"),
                usage=_usage(done.usage),
                request_id=done.request_id,
                other_finish_reasons=tuple(
                    _known(_FINISH, reason, "other_finish_reasons") for reason in done.other_finish_reasons
                ),
            )
    raise _incomprehensible("an event of unknown kind")


def answer(events: Iterable[results.StreamEvent]) -> results.Answer:
    """All events of one stream as one answer.

    Raises:
        InternalError: the stream ended without `Routing` or `Done`.
    """
    first: results.Routing | None = None
    last: results.Done | None = None
    deltas: list[results.Delta] = []
    for item in events:
        if isinstance(item, results.Routing):
            first = item
        elif isinstance(item, results.Done):
            last = item
        else:
            deltas.append(item)
    if first is None or last is None:
        raise _incomprehensible("a stream that ended early")
    reasons = (last.finish_reason, *last.other_finish_reasons)
    choices = tuple(
        _choice([delta for delta in deltas if delta.choice == number], reason) for number, reason in enumerate(reasons)
    )
    return results.Answer(choices=choices, routing=first, usage=last.usage, request_id=last.request_id)


def routing(message: pb.Routing) -> results.Routing:
    """Who answers."""
    return results.Routing(
        task=message.task or None,
        how=_known(_HOW, message.how, "how"),
        margin=message.margin,
        scores=tuple(results.TaskScore(item.task, item.score) for item in message.scores),
        generation=message.generation,
        experts=tuple(
            results.ExpertUse(
                digest=item.digest,
                task=item.task,
                num_layers=item.num_layers,
                source=_known(_SOURCE, item.source, "source"),
                bytes_read=item.bytes_read,
                load_s=item.load_seconds,
            )
            for item in message.experts
        ),
        request_id=message.request_id,
    )


def description(message: pb.DescribeResponse) -> results.Description:
    """What is served and how it is doing."""
    memory, engine = message.memory, message.engine
    return results.Description(
        base_name=message.base.name,
        base_digest=message.base.digest,
        generation=message.generation,
        tasks=tuple(task.name for task in message.tasks),
        memory=results.MemoryStatistics(
            budget_bytes=memory.budget_bytes,
            resident_bytes=memory.resident_bytes,
            reserved_bytes=memory.reserved_bytes,
            resident_units=memory.resident_units,
            hits=memory.hits,
            misses=memory.misses,
            loads=memory.loads,
            evictions=memory.evictions,
            failures=memory.failures,
            bytes_read=memory.bytes_read,
            load_s=memory.load_seconds,
            prefetch_useful_bytes=memory.prefetch_useful_bytes,
            prefetch_wasted_bytes=memory.prefetch_wasted_bytes,
        ),
        engine=results.EngineStatistics(
            running=engine.running,
            waiting=engine.waiting,
            steps=engine.steps,
            tokens=engine.tokens,
            kv_bytes_reserved=engine.kv_bytes_reserved,
            stall_s=engine.stall_seconds,
        ),
    )


def _choice(deltas: Sequence[results.Delta], reason: results.FinishReason) -> results.Choice:
    return results.Choice(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        finish_reason=reason,
        logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
    )


def _token_logprob(message: pb.TokenLogprob) -> results.TokenLogprob:
    return results.TokenLogprob(_alternative(message.chosen), tuple(_alternative(item) for item in message.top))


def _alternative(message: pb.Alternative) -> results.Alternative:
    return results.Alternative(message.token_id, message.text, message.logprob)


def _as_json(schema: object) -> str:
    try:
        return json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise _refused("sampling.json_schema", f"is not JSON: {error}") from error


def _usage(message: pb.Usage) -> results.Usage:
    return results.Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        queue_s=message.queue_seconds,
        first_token_s=message.first_token_seconds,
        total_s=message.total_seconds,
    )


def _assign(message: Any, name: str, value: object, *, path: str = "") -> None:  # noqa: ANN401 - any protobuf message
    """Set a field unless `value` is None; a value that the field cannot carry is refused by the field's path."""
    if value is None:
        return
    try:
        if name == "stop":
            message.stop.extend(value)
        else:
            setattr(message, name, value)
    except (TypeError, ValueError) as error:
        raise _refused(path or name, str(error)) from error


def _known(words: dict[int, Word], value: int, field: str) -> Word:
    if value not in words:
        raise _incomprehensible(f"{field}={value}")
    return words[value]


def _refused(field: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{field}: {problem}",
        code=grpc.StatusCode.INVALID_ARGUMENT,
        reason="INVALID_FIELD",
        field_violations=(FieldViolation(field, problem),),
    )


def _incomprehensible(what: str) -> InternalError:
    return InternalError(
        f"the server sent {what}; is it newer than this client?",
        code=grpc.StatusCode.INTERNAL,
        reason="BAD_RESPONSE",
    )
