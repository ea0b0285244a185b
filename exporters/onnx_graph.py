"""An ONNX file: built from its textual form and named tensors, written, verified, described.

It knows nothing of what a graph computes.
Read first: graphs are written in ONNX's own textual syntax, one line per operation, so that a graph reads like the
formula it is, and is not traced from the torch code that it is verified against.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx.checker
import onnx.helper
import onnx.numpy_helper
import torch

from exporters.artefact import sha256_of
from exporters.manifest import Check, Facts, FileEntry, TensorSpec
from exporters.opsets import OPSET, parse_graph
from exporters.verify import Case, verify

Progress = Callable[[str], None]


def build_model(
    graph: str,
    tensors: Mapping[str, torch.Tensor],
    facts: Facts,
    *,
    domains: Iterable[str] = (),
    opset: int = OPSET,
) -> onnx.ModelProto:
    """Build and check a model; equal arguments give equal bytes, whatever the order of `tensors`.

    Args:
        graph: `name (inputs) => (outputs) { nodes }` in ONNX's textual syntax.
        tensors: its constants by name.
        facts: go into the model's metadata, each value as JSON.
        domains: of operations that are not ONNX's own; in version 1.
        opset: a key of `exporters.opsets.IR_VERSIONS`.
    """
    model = parse_graph(graph, opset=opset, domains=domains)
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in sorted(tensors.items())
    )
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in facts.items()})
    onnx.checker.check_model(model, full_check=True)
    return model


def write_verified(
    path: Path, model: onnx.ModelProto, facts: Facts, cases: Iterable[Case], on_progress: Progress
) -> FileEntry:
    """Write a model and verify the file as it then lies on disk.

    Raises:
        ExportMismatchError: see `verify`.
    """
    on_progress(f"{path.name}: writing")
    path.write_bytes(model.SerializeToString(deterministic=True))
    on_progress(f"{path.name}: verifying in onnxruntime")
    return describe_graph(path, model, facts, verify(path, cases))


def describe_graph(path: Path, model: onnx.ModelProto, facts: Facts, checks: tuple[Check, ...]) -> FileEntry:
    """The manifest's entry of a graph."""
    return FileEntry(
        name=path.name,
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
        opset=next(one.version for one in model.opset_import if not one.domain),
        inputs=_specs(model.graph.input),
        outputs=_specs(model.graph.output),
        facts=facts,
        checks=checks,
    )


def _specs(values: Iterable[Any]) -> tuple[TensorSpec, ...]:
    specs = []
    for value in values:
        tensor = value.type.tensor_type
        shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        specs.append(TensorSpec(name=value.name, dtype=dtype, shape=shape))
    return tuple(specs)
