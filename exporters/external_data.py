"""An ONNX graph whose weights lie in a file beside it, written one tensor at a time.

It knows nothing of what a graph computes.
Read first: a protobuf message cannot exceed 2 GB and is held in memory as a whole; weights beside it are neither
limited nor copied, and onnxruntime maps them into memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
import onnx.checker
import onnx.helper
import torch

from exporters.manifest import Facts
from exporters.opsets import OPSET, parse_graph

ALIGNMENT = 4096
"""Bytes to which every tensor is aligned, so that it can be mapped."""

NamedTensors = Iterable[tuple[str, torch.Tensor]]

_DTYPES = {torch.float32: onnx.TensorProto.FLOAT, torch.uint8: onnx.TensorProto.UINT8}


def write_graph(
    path: Path,
    graph: str,
    tensors: NamedTensors,
    facts: Facts,
    *,
    weights: str,
    domains: Iterable[str] = (),
    opset: int = OPSET,
) -> onnx.ModelProto:
    """Write `path`, its constants into the file `weights` beside it, and check the graph.

    Args:
        path: the graph's file.
        graph: `name (inputs) => (outputs) { nodes }` in ONNX's textual syntax.
        tensors: its constants, float32 or uint8; each is asked for when the one before is written.
        facts: go into the model's metadata, each value as JSON.
        weights: name of the weights' file.
        domains: of operations that are not ONNX's own; in version 1.
        opset: a key of `exporters.opsets.IR_VERSIONS`.

    Returns:
        the model without its weights.
    """
    model = parse_graph(graph, opset=opset, domains=domains)
    model.graph.initializer.extend(_write_tensors(path.with_name(weights), tensors))
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in facts.items()})
    path.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path), full_check=True)
    return model


def _write_tensors(path: Path, tensors: NamedTensors) -> Iterator[onnx.TensorProto]:
    """Append every tensor to the file; yields where it lies."""
    with path.open("wb") as file:
        for name, tensor in tensors:
            file.write(bytes(-file.tell() % ALIGNMENT))
            offset, data = file.tell(), tensor.detach().contiguous().numpy()
            data.tofile(file)
            entry = onnx.TensorProto(
                name=name,
                data_type=_DTYPES[tensor.dtype],
                dims=list(tensor.shape),
                data_location=onnx.TensorProto.EXTERNAL,
            )
            for key, value in (("location", path.name), ("offset", offset), ("length", data.nbytes)):
                entry.external_data.add(key=key, value=str(value))
            yield entry
