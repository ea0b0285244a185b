"""Requests of the Open Inference Protocol in the engine's words.

It knows nothing of calls or streams.
Read first: every parameter is used or refused by name. A client's id is only an echo: clients number their requests as
they like, so the engine gets a name of our own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.engine.request import Request, SamplingParams
from runtime.errors import InvalidInputError
from runtime.model.names import check_name
from runtime.service.convert import MAX_PROMPT_CHARS, reject_unknown
from runtime.service.oip_tensors import OUTPUTS, ROUTING, TEXT_INPUT, TEXT_OUTPUT, text_of
from runtime.service.request_id import new_request_id

if TYPE_CHECKING:
    from greenroom.pb.inference import grpc_service_pb2 as pb
    from runtime.service.models import Model, Models

EMPTY_FINAL = "triton_enable_empty_final_response"
MAX_ID_CHARS = 256
_INT, _FLOAT = ("int64_param", "uint64_param"), ("double_param", "int64_param", "uint64_param")
_TEXT = ("string_param",)
_SAMPLING = {
    **dict.fromkeys(("max_tokens", "top_k", "seed"), _INT),
    **dict.fromkeys(("temperature", "top_p", "min_p"), _FLOAT),
    **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), _FLOAT),
    **dict.fromkeys(("json_schema", "regex"), _TEXT),
}
_KINDS = {
    **_SAMPLING,
    "task": _TEXT,
    "explain": ("bool_param",),
    "abstain_fails": ("bool_param",),
    "default_task": _TEXT,
    "priority": ("uint64_param", "int64_param"),
    "tenant": _TEXT,
    "timeout": _INT,
    EMPTY_FINAL: ("bool_param",),
}


@dataclass(frozen=True, kw_only=True)
class Inference:
    """One request, understood.

    Args:
        request: for the engine.
        model: that was named.
        client_id: what every response carries.
        outputs: names of outputs, in the order in which they go out.
        empty_final: the last response of a stream has no outputs.
    """

    request: Request
    model: Model
    client_id: str
    outputs: tuple[str, ...]
    empty_final: bool


def inference_of(
    message: pb.ModelInferRequest, models: Models, *, deadline: float | None, tenant: str = ""
) -> Inference:
    """What a client wants.

    Args:
        message: as it came.
        models: that may be named.
        deadline: of the call; the parameter `timeout` can make it earlier.
        tenant: of the caller, for requests that name none.

    Raises:
        UnknownModelError, UnavailableError: the model does not exist, or takes no requests now.
        InvalidInputError: a field or parameter that is unknown or out of range.
    """
    reject_unknown(message)
    if len(message.id) > MAX_ID_CHARS:
        raise InvalidInputError("id", message.id, f"has at most {MAX_ID_CHARS} characters")
    model = models.get_ready(message.model_name, message.model_version)
    chosen = {name: _value(name, parameter) for name, parameter in message.parameters.items()}
    request = Request(
        request_id=new_request_id(),
        text=_checked(text_of(message)),
        task=_task(model, chosen.get("task")),
        explain=chosen.get("explain", False),
        abstain_fails=chosen.get("abstain_fails", False),
        default_task=check_name("parameters.default_task", chosen["default_task"])
        if "default_task" in chosen
        else None,
        priority=chosen.get("priority", 0),
        tenant=check_name("parameters.tenant", chosen["tenant"]) if "tenant" in chosen else tenant,
        sampling=_sampling({name: chosen[name] for name in _SAMPLING if name in chosen}),
        deadline=_deadline(deadline, chosen.get("timeout")),
    )
    return Inference(
        request=request,
        model=model,
        client_id=message.id,
        outputs=_outputs(message, explain=chosen.get("explain", False)),
        empty_final=chosen.get(EMPTY_FINAL, False),
    )


def on_the_wire(error: InvalidInputError) -> InvalidInputError:
    """The same error, naming the input instead of the engine's field."""
    return InvalidInputError(TEXT_INPUT, "", error.problem) if error.field in {"text", "input"} else error


def _value(name: str, parameter: pb.InferParameter) -> Any:  # noqa: ANN401 - as its kind says
    field = f"parameters.{name[:80]}"
    kind = parameter.WhichOneof("parameter_choice")
    if name not in _KINDS:
        raise InvalidInputError(field, kind, f"unknown here; known are {', '.join(sorted(_KINDS))}")
    if kind not in _KINDS[name]:
        raise InvalidInputError(field, kind, f"must be {' or '.join(_KINDS[name])}")
    return getattr(parameter, kind)


def _checked(text: str) -> str:
    if not 0 < len(text) <= MAX_PROMPT_CHARS:
        raise InvalidInputError(TEXT_INPUT, text, f"must have 1 to {MAX_PROMPT_CHARS} characters, has {len(text)}")
    return text


def _task(model: Model, chosen: str | None) -> str | None:
    if chosen is None:
        return model.task
    if model.task is not None:
        raise InvalidInputError("parameters.task", chosen, f"the model's name {model.name!r} pins a task already")
    return check_name("parameters.task", chosen)


def _sampling(chosen: dict[str, Any]) -> SamplingParams:
    try:
        return SamplingParams(**chosen)
    except InvalidInputError as error:
        raise InvalidInputError(f"parameters.{error.field}", chosen.get(error.field), error.problem) from error


def _deadline(of_call: float | None, timeout_us: int | None) -> float | None:
    if timeout_us is None:
        return of_call
    if timeout_us < 1:
        raise InvalidInputError("parameters.timeout", timeout_us, "microseconds, at least 1")
    own = time.monotonic() + timeout_us / 1e6
    return own if of_call is None else min(own, of_call)


def _outputs(message: pb.ModelInferRequest, *, explain: bool) -> tuple[str, ...]:
    names = [output.name for output in message.outputs]
    for output in message.outputs:
        if output.name not in OUTPUTS:
            raise InvalidInputError("outputs", output.name, f"unknown here; known are {', '.join(OUTPUTS)}")
        if output.parameters:
            raise InvalidInputError("outputs.parameters", sorted(output.parameters)[:8], "none is known")
    if len(set(names)) != len(names):
        raise InvalidInputError("outputs", names[:8], "names an output twice")
    names = names or [TEXT_OUTPUT]
    return (*names, ROUTING) if explain and ROUTING not in names else tuple(names)
