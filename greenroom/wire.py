"""Between the client's words and protobuf: requests are built here, responses parsed, for both clients.

It knows nothing of channels or calls: every function is pure.
Read first: an option that is left out is left out on the wire too, so the server's defaults are written in one place.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from greenroom import results
from greenroom.client_errors import FieldViolation, InternalError, InvalidRequestError
from greenroom.options import GenerateOptions, LocateOptions, Prompt, RouteOptions
from greenroom.pb.greenroom.v1 import greenroom_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Word = TypeVar("Word")

_HOW: dict[int, results.How] = {
    pb.HOW_LOCATED: "located",
    pb.HOW_PINNED: "pinned",
    pb.HOW_ABSTAINED: "abstained",
    pb.HOW_BASE: "base",
    pb.HOW_DEFAULTED: "defaulted",
    pb.HOW_WEIGHTED: "weighted",
}
_ROLE = {"system": pb.ROLE_SYSTEM, "user": pb.ROLE_USER, "assistant": pb.ROLE_ASSISTANT}
_ROUTE = ("task", "base_only", "abstain_fails", "default_task", "explain", "request_id", "priority", "tenant")
_SOURCE: dict[int, results.Source] = {pb.SOURCE_HOST: "host", pb.SOURCE_DISK: "disk"}
_FINISH: dict[int, results.FinishReason] = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}


def generate_request(prompt: Prompt, options: GenerateOptions) -> pb.GenerateRequest:
    """The message for one prompt.

    Raises:
        InvalidRequestError: an option that the wire cannot carry, or two that exclude each other.
        TypeError: an option that does not exist.
    """
    _check_known(options, GenerateOptions)
    message = pb.GenerateRequest()
    _fill(message, prompt, options)
    if isinstance(options.get("stop"), str):
        raise _refused("sampling.stop", "a sequence of strings, not one string")
    if options.get("json_schema") is not None and options.get("regex") is not None:
        raise _refused("sampling.regex", "excludes json_schema")
    sampling = pb.Sampling()
    for name in pb.Sampling.DESCRIPTOR.fields_by_name:
        value = options.get(name)
        if name == "json_schema" and value is not None and not isinstance(value, str):
            value = _as_json(value)
        _assign(sampling, name, value, path=f"sampling.{name}")
    if sampling.ListFields():
        message.sampling.CopyFrom(sampling)
    return message


def score_request(prompt: Prompt, continuation: str, options: RouteOptions) -> pb.ScoreRequest:
    """The message that asks how likely an answer is; errors as in `generate_request`."""
    _check_known(options, RouteOptions)
    message = pb.ScoreRequest()
    _fill(message, prompt, options)
    _assign(message, "continuation", continuation)
    return message


def locate_request(prompt: Prompt, options: LocateOptions) -> pb.LocateRequest:
    """The message that asks where one prompt belongs; errors as in `generate_request`."""
    _check_known(options, LocateOptions)
    message = pb.LocateRequest()
    _fill(message, prompt, options)
    return message


def _check_known(options: Mapping[str, object], known: Any) -> None:  # noqa: ANN401 - a TypedDict class
    unknown = options.keys() - known.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")


def _fill(message: Any, prompt: Prompt, options: Mapping[str, Any]) -> None:  # noqa: ANN401 - of several requests
    """Set what is asked and who answers."""
    if options.get("base_only") and options.get("task") is not None:
        raise _refused("task", "cannot be pinned together with base_only")
    if options.get("abstain_fails") and options.get("default_task") is not None:
        raise _refused("default_task", "excludes abstain_fails")
    if isinstance(prompt, str):
        _assign(message, "raw_prompt" if options.get("raw") else "input", prompt)
    elif options.get("raw"):
        raise _refused("raw_prompt", "a chat is not a raw prompt")
    else:
        message.chat.SetInParent()
        for place, turn in enumerate(prompt):
            if turn.keys() != {"role", "content"} or turn["role"] not in _ROLE:
                raise _refused(f"chat.messages[{place}]", f"takes content, and a role of {', '.join(_ROLE)}")
            added = message.chat.messages.add(role=_ROLE[turn["role"]])
            _assign(added, "content", turn["content"], path=f"chat.messages[{place}].content")
    if isinstance(options.get("group_mask"), str):
        raise _refused("group_mask", "a sequence of strings, not one string")
    for name in ("group_bias", "group_mask", "task_weights"):
        _assign(message, name, options.get(name))
    for name in _ROUTE:
        value = options.get(name)
        _assign(message, name, None if value is False else value)


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
                explanation=_explanation(done),
            )
    raise _incomprehensible("an event of unknown kind")


def score(message: pb.ScoreResponse) -> results.Score:
    """How likely an answer is."""
    return results.Score(
        routing=routing(message.routing),
        tokens=tuple(_alternative(item) for item in message.tokens),
        logprob=message.logprob,
        usage=_usage(message.usage),
        explanation=_explanation(message),
    )


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
    return results.Answer(
        choices=choices,
        routing=first,
        usage=last.usage,
        request_id=last.request_id,
        explanation=last.explanation,
    )


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
        task_weights=dict(message.task_weights),
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
            prefix_hits=engine.prefix_hits,
            prefix_base_tokens=engine.prefix_base_tokens,
            prefix_adapted_tokens=engine.prefix_adapted_tokens,
            prefix_bytes=engine.prefix_bytes,
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


def _explanation(message: pb.Done | pb.ScoreResponse) -> tuple[results.LayerWeights, ...]:
    return tuple(
        results.LayerWeights(layer=item.layer, experts=dict(item.experts), groups=dict(item.groups))
        for item in message.explanation
    )


def _usage(message: pb.Usage) -> results.Usage:
    return results.Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        queue_s=message.queue_seconds,
        first_token_s=message.first_token_seconds,
        total_s=message.total_seconds,
        cached_tokens=message.cached_tokens,
    )


def _assign(message: Any, name: str, value: object, *, path: str = "") -> None:  # noqa: ANN401 - any protobuf message
    """Set a field unless `value` is None; a value that the field cannot carry is refused by the field's path."""
    if value is None:
        return
    try:
        if name in {"stop", "group_mask"}:
            getattr(message, name).extend(value)
        elif name in {"group_bias", "task_weights"}:
            getattr(message, name).update(value)
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
