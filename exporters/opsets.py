"""Which opset a graph is written in: the versions of ONNX's operations and of its file format.

It knows nothing of graphs.
Read first: our graphs mean the same in all of `IR_VERSIONS`; a file is verified in the one that it was written in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import onnx
import onnx.parser

OPSET = 18
"""Where none is chosen: the oldest, which most runtimes read."""

IR_VERSIONS: Mapping[int, int] = MappingProxyType({OPSET: 8, 19: 9, 20: 9, 21: 10})
"""Opset -> version of the file format that came with it."""


def parse_graph(graph: str, *, opset: int, domains: Iterable[str]) -> onnx.ModelProto:
    """The model of a graph in ONNX's textual syntax; of other `domains` version 1 is used."""
    imports = ", ".join([f'"" : {opset}', *(f'"{domain}" : 1' for domain in domains)])
    header = f"<ir_version: {IR_VERSIONS[opset]}, opset_import: [{imports}]>"
    model: onnx.ModelProto = onnx.parser.parse_model(f"{header}\n{graph}")
    model.producer_name = "greenroom"
    return model
