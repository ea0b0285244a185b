"""Between protobuf and the engine's words: requests are checked and converted here, events and statistics sent back.

It knows nothing of calls, threads or statuses: every function is pure.
Read first: every field of a request is used or refused; errors name the field as it is called on the wire.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from greenroom.pb.greenroom.v1 import greenroom_pb2 as pb
from runtime.engine.request import Alternative, Finished, Located, Request, SamplingParams, TokenDelta, TokenLogprob
from runtime.errors import InvalidInputError
from runtime.model.names import check_name

if TYPE_CHECKING:
    from runtime.engine.statistics import EngineStatistics

MAX_PROMPT_CHARS = 1_000_000
"""Bounds the work of tokenising before the engine can refuse a prompt for its length in tokens."""

_HOW = {"located": pb.HOW_LOCATED, "pinned": pb.HOW_PINNED, "abstained": pb.HOW_ABSTAINED, "base": pb.HOW_BASE}
_SOURCE = {"host": pb.SOURCE_HOST, "disk": pb.SOURCE_DISK}
_FINISH = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}
_PRESENCE = frozenset(field.name for field in pb.Sampling.DESCRIPTOR.fields if field.has_presence)


def generate_request(message: pb.GenerateRequest, *, request_id: str, deadline: float | None) -> Request:
    """The engine's request for a `GenerateRequest`.

    Args:
        message: as it came.
        request_id: the request's name, already checked.
        deadline: absolute, on the clock of `time.monotonic()`; None for none.

    Raises:
        InvalidInputError: a field that is missing, unknown or out of range.
    """
    reject_unknown(message)
    text, raw = _prompt(message)
    route = message.WhichOneof("route")
    return Request(
        request_id=request_id,
        text=text,
        raw=raw,
        task=check_name("task", message.task) if route == "task" else None,
        base_only=route == "base_only" and message.base_only,
        sampling=_sampling(message.sampling),
        deadline=deadline,
    )


def locate_request(message: pb.LocateRequest, *, request_id: str, deadline: float | None) -> Request:
    """The engine's request for a `LocateRequest`; arguments and errors as in `generate_request`."""
    reject_unknown(message)
    text, raw = _prompt(message)
    return Request(request_id=request_id, text=text, raw=raw, locate_only=True, deadline=deadline)


def reject_unknown(message: Message, path: str = "") -> None:
    """Refuse fields that a newer client set and this server would ignore.

    Raises:
        InvalidInputError: there is one; it is named by its number.
    """
    unknown = UnknownFieldSet(message)
    if len(unknown) > 0:
        number = unknown[0].field_number
        raise InvalidInputError(f"{path}{number}", "set", "this server knows no field of this number")
    for descriptor, value in message.ListFields():
        if isinstance(value, Message):
            reject_unknown(value, f"{path}{descriptor.name}.")


def on_the_wire(error: InvalidInputError, message: pb.GenerateRequest | pb.LocateRequest) -> InvalidInputError:
    """The same error, naming the field of `message` instead of the engine's."""
    if error.field in {"text", "input"}:
        field = message.WhichOneof("prompt") or "input"
        return InvalidInputError(field, getattr(message, field), error.problem)
    if isinstance(message, pb.GenerateRequest) and error.field in pb.Sampling.DESCRIPTOR.fields_by_name:
        return _in_sampling(error, message.sampling)
    return error


def response(event: Located | TokenDelta | Finished, request_id: str) -> pb.GenerateResponse:
    """One event of an answer."""
    match event:
        case Located():
            return pb.GenerateResponse(routing=routing(event, request_id))
        case TokenDelta():
            logprobs = [_token_logprob(item) for item in event.logprobs]
            delta = pb.TokenDelta(text=event.text, token_ids=event.token_ids, choice=event.choice, logprobs=logprobs)
            return pb.GenerateResponse(delta=delta)
        case Finished():
            return pb.GenerateResponse(done=_done(event, request_id))


def routing(located: Located, request_id: str) -> pb.Routing:
    """Who answers, why, and with which experts."""
    return pb.Routing(
        task=located.task or "",
        how=_HOW[located.how],
        margin=located.margin,
        scores=[pb.TaskScore(task=item.task, score=item.score) for item in located.scores],
        generation=located.generation,
        experts=[
            pb.ExpertUse(
                digest=item.digest,
                task=item.task,
                num_layers=item.num_layers,
                source=_SOURCE[item.source],
                bytes_read=item.bytes_read,
                load_seconds=item.load_s,
            )
            for item in located.experts
        ],
        request_id=request_id,
    )


def description(base_name: str, base_digest: str, statistics: EngineStatistics) -> pb.DescribeResponse:
    """What is served and how it is doing."""
    memory = statistics.memory
    return pb.DescribeResponse(
        base=pb.Base(name=base_name, digest=base_digest),
        generation=statistics.generation,
        tasks=[pb.Task(name=name) for name in statistics.tasks],
        memory=pb.MemoryStatistics(
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
            load_seconds=memory.load_s,
            prefetch_useful_bytes=memory.prefetch_useful_bytes,
            prefetch_wasted_bytes=memory.prefetch_wasted_bytes,
        ),
        engine=pb.EngineStatistics(
            running=statistics.running,
            waiting=statistics.waiting,
            steps=statistics.steps,
            tokens=statistics.tokens,
            kv_bytes_reserved=statistics.kv_bytes_reserved,
            stall_seconds=statistics.stall_s,
        ),
    )


def _prompt(message: pb.GenerateRequest | pb.LocateRequest) -> tuple[str, bool]:
    """The text, and whether it is the whole prompt."""
    field = message.WhichOneof("prompt")
    if field is None:
        raise InvalidInputError("input", "", "input or raw_prompt is required")
    text = getattr(message, field)
    if not 0 < len(text) <= MAX_PROMPT_CHARS:
        raise InvalidInputError(field, text, f"must have 1 to {MAX_PROMPT_CHARS} characters, has {len(text)}")
    return text, field == "raw_prompt"


def _sampling(message: pb.Sampling) -> SamplingParams:
    """What the client set, over the engine's defaults."""
    chosen = {name: getattr(message, name) for name in _PRESENCE if message.HasField(name)}
    try:
        return SamplingParams(stop=tuple(message.stop), ignore_eos=message.ignore_eos, **chosen)
    except InvalidInputError as error:
        raise _in_sampling(error, message) from error


def _in_sampling(error: InvalidInputError, message: pb.Sampling) -> InvalidInputError:
    return InvalidInputError(f"sampling.{error.field}", getattr(message, error.field), error.problem)


def _token_logprob(logprob: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(chosen=_alternative(logprob.chosen), top=[_alternative(item) for item in logprob.top])


def _alternative(item: Alternative) -> pb.Alternative:
    return pb.Alternative(token_id=item.token_id, text=item.text, logprob=item.logprob)


def _done(finished: Finished, request_id: str) -> pb.Done:
    usage = finished.usage
    return pb.Done(
        finish_reason=_FINISH[finished.reason],
        other_finish_reasons=[_FINISH[reason] for reason in finished.other_reasons],
        usage=pb.Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            queue_seconds=usage.queue_s,
            first_token_seconds=usage.first_token_s,
            total_seconds=usage.total_s,
        ),
        request_id=request_id,
    )
