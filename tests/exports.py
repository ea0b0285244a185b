"""What tests of exports share: running a file, and making it wrong between writing and verifying.

It does not know any test.
Read first: `sabotage` acts through the progress callback, which is called after a file is written and before it is
verified.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import torch

from exporters.verify import open_session


def quiet(_text: str) -> None:
    """Progress that nobody watches."""


def run(path: Path, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    session = open_session(path)
    values = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return {output.name: torch.from_numpy(value) for output, value in zip(session.get_outputs(), values, strict=True)}


def change_constant(path: Path, name: str) -> None:
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    value = onnx.numpy_helper.to_array(tensor)
    changed = ~value if value.dtype == np.bool_ else (value * 1.1 + 1).astype(value.dtype)
    tensor.CopyFrom(onnx.numpy_helper.from_array(changed, name))
    onnx.save(model, path)


def sabotage(root: Path, constant: str) -> Callable[[str], None]:
    """A progress callback that changes a constant of every graph once it is written and before it is verified."""

    def on_progress(text: str) -> None:
        if "verifying" in text:
            change_constant(next(root.rglob(".partial-*")) / text.partition(":")[0], constant)

    return on_progress


def files_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != ".writer-lock")
