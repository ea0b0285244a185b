"""Tensors of the Open Inference Protocol: one text comes in, raw or typed; texts and token ids go out raw.

It knows nothing of models or requests.
Read first: a BYTES element is `<uint32 length, little end first><bytes>`; a model has one input, a text of one element.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from greenroom.pb.inference import grpc_service_pb2 as pb
from runtime.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

TEXT_INPUT = "text_input"
TEXT_OUTPUT, TOKEN_IDS, ROUTING = "text_output", "token_ids", "routing"
OUTPUTS = {TEXT_OUTPUT: ("BYTES", (1,)), TOKEN_IDS: ("INT64", (-1,)), ROUTING: ("BYTES", (1,))}
"""Datatype and shape of each output."""

_MAX_RANK = 4
_LENGTH = struct.Struct("<I")


def text_of(message: pb.ModelInferRequest) -> str:
    """The prompt of a request.

    Raises:
        InvalidInputError: there is not exactly one input `text_input`, BYTES, of one element of UTF-8.
    """
    names = [tensor.name[:80] for tensor in message.inputs]
    if names != [TEXT_INPUT]:
        raise InvalidInputError("inputs", names[:8], f"a model takes exactly one input, {TEXT_INPUT!r}")
    (tensor,) = message.inputs
    if tensor.datatype != "BYTES":
        raise InvalidInputError("inputs.datatype", tensor.datatype, f"{TEXT_INPUT} is BYTES")
    if len(tensor.shape) > _MAX_RANK or any(size != 1 for size in tensor.shape):
        raise InvalidInputError("inputs.shape", list(tensor.shape[:8]), f"{TEXT_INPUT} has one element")
    if tensor.parameters:
        raise InvalidInputError("inputs.parameters", sorted(tensor.parameters)[:8], "none is known")
    elements = _elements(message, tensor)
    if len(elements) != 1:
        raise InvalidInputError("inputs.contents", len(elements), f"{TEXT_INPUT} has one element")
    try:
        return elements[0].decode()
    except UnicodeDecodeError as error:
        raise InvalidInputError(TEXT_INPUT, elements[0], "is not UTF-8") from error


def add_output(response: pb.ModelInferResponse, name: str, value: str | Sequence[int]) -> None:
    """Append one output to a response.

    Args:
        response: is changed in place.
        name: a key of `OUTPUTS`.
        value: a text for BYTES, whole numbers for INT64.
    """
    datatype, _ = OUTPUTS[name]
    if isinstance(value, str):
        raw = value.encode()
        shape, contents = 1, _LENGTH.pack(len(raw)) + raw
    else:
        shape, contents = len(value), struct.pack(f"<{len(value)}q", *value)
    response.outputs.add(name=name, datatype=datatype, shape=[shape])
    response.raw_output_contents.append(contents)


def _elements(message: pb.ModelInferRequest, tensor: pb.ModelInferRequest.InferInputTensor) -> list[bytes]:
    if not message.raw_input_contents:
        filled = [field.name for field, _ in tensor.contents.ListFields()]
        if filled not in ([], ["bytes_contents"]):
            raise InvalidInputError("inputs.contents", filled, f"{TEXT_INPUT} is BYTES")
        return list(tensor.contents.bytes_contents)
    if tensor.HasField("contents"):
        raise InvalidInputError("inputs.contents", "set", "cannot be set together with raw_input_contents")
    if len(message.raw_input_contents) != 1:
        raise InvalidInputError("raw_input_contents", len(message.raw_input_contents), "must have one entry per input")
    return _split(message.raw_input_contents[0])


def _split(raw: bytes) -> list[bytes]:
    """Elements of a raw BYTES tensor; at most two, which is one too many."""
    elements: list[bytes] = []
    at = 0
    while at < len(raw) and len(elements) <= 1:
        start = at + _LENGTH.size
        end = start + _LENGTH.unpack(raw[at:start])[0] if start <= len(raw) else start
        if end > len(raw):
            raise InvalidInputError("raw_input_contents", len(raw), "ends inside an element")
        elements.append(raw[start:end])
        at = end
    return elements
