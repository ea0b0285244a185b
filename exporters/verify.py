"""Verification: the written file, run by onnxruntime, against what torch computes.

It knows nothing of locators or routers; a target says which inputs to try and what torch makes of them.
Read first: a decision (which task, which experts) may flip where two candidates are equal up to rounding. A case marks
such rows as not settled and they are left out; a full batch without a single settled row verifies nothing, and fails.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnxruntime
import torch

from exporters.manifest import Check
from runtime.errors import ExportMismatchError, InvalidInputError, UnsupportedDeviceError

SIZES = (1, 2, 7, 64)
"""Rows per case, so that one row, an odd number and a full batch are all tried."""

TOLERANCE = 1e-5
"""Largest error of a float32 output in units of `max(1, scale)`: two orders above float32's own resolution."""


@dataclass(frozen=True)
class Wanted:
    """What torch computes for one output.

    Args:
        value: [B, ...].
        scale: size of the terms that were added up to `value`, broadcastable to it; default: `|value|`.
        settled: [B] bool, rows that are to be compared; default: all.
        tolerance: largest error in units of `max(1, scale)`; integers must be equal whatever it is.
    """

    value: torch.Tensor
    scale: torch.Tensor | None = None
    settled: torch.Tensor | None = None
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class Case:
    """One run: `size` rows of input and what every output must be."""

    size: int
    inputs: Mapping[str, torch.Tensor]
    outputs: Mapping[str, Wanted]


@dataclass
class Tally:
    """The comparisons of one output so far."""

    output: str
    tolerance: float = 0.0
    sizes: set[int] = field(default_factory=set)
    rows: int = 0
    compared: int = 0
    max_error: float = 0.0

    def compare(self, where: str, got: np.ndarray, wanted: Wanted, size: int) -> None:
        """Compare one value of `size` rows.

        Raises:
            ExportMismatchError: another dtype or shape, or a difference above the tolerance; `where` names the value.
        """
        value = wanted.value.numpy()
        if got.dtype != value.dtype or got.shape != value.shape:
            raise ExportMismatchError(f"{where} is {got.dtype} {got.shape}, torch has {value.dtype} {value.shape}")
        exact = not np.issubdtype(value.dtype, np.floating)
        self.tolerance = 0.0 if exact else max(self.tolerance, wanted.tolerance)
        settled = np.ones(size, dtype=bool) if wanted.settled is None else wanted.settled.numpy()
        if size == SIZES[-1] and not settled.any():
            raise ExportMismatchError(
                f"{where}: no row could be compared with torch, all lie on the border of a decision"
            )
        self.sizes.add(size)
        self.rows += size
        self.compared += int(settled.sum())
        scale = np.abs(value) if wanted.scale is None else wanted.scale.numpy()
        error = np.abs(got - value) / (1 if exact else np.maximum(scale, 1))
        worst = float(error[settled].max(initial=0.0))
        self.max_error = max(self.max_error, worst)
        if not worst <= self.tolerance:  # true for NaN as well
            raise ExportMismatchError(
                f"{where} differs from torch on {size} rows: largest error {worst:.3g}, tolerance {self.tolerance:.3g}"
            )

    def check(self) -> Check:
        """What the manifest says of it."""
        return Check(
            output=self.output,
            sizes=tuple(sorted(self.sizes)),
            rows=self.rows,
            rows_compared=self.compared,
            max_error=self.max_error,
            tolerance=self.tolerance,
        )


PROVIDERS: Mapping[str, str] = MappingProxyType({"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"})
"""Device -> what onnxruntime calls it."""


def session_providers(device: str, available: Collection[str] | None = None) -> list[str]:
    """What a session is opened with: the device's provider, then the CPU's for operations that it lacks.

    Args:
        device: cpu, cuda, or auto: cuda where onnxruntime has it.
        available: what this onnxruntime has; default: ask it.

    Raises:
        InvalidInputError: another device.
        UnsupportedDeviceError: onnxruntime has no provider for it.
    """
    if device not in ("auto", *PROVIDERS):
        raise InvalidInputError("device", device, f"must be one of auto, {', '.join(PROVIDERS)}")
    has = onnxruntime.get_available_providers() if available is None else available
    if device == "auto":
        device = "cuda" if PROVIDERS["cuda"] in has else "cpu"
    if PROVIDERS[device] not in has:
        raise UnsupportedDeviceError(
            f"device {device}: this onnxruntime has {', '.join(has)}; {PROVIDERS[device]} comes with onnxruntime-gpu"
        )
    return list(dict.fromkeys((PROVIDERS[device], PROVIDERS["cpu"])))


def open_session(path: Path, *, device: str = "cpu") -> Any:  # noqa: ANN401 - onnxruntime is not typed
    """Open a file in onnxruntime, one CPU thread.

    Args:
        path: the file.
        device: see `session_providers`; files are always verified on the CPU.

    Raises:
        InvalidInputError, UnsupportedDeviceError: see `session_providers`; also where the provider does not load.
        ExportMismatchError: onnxruntime does not take the file.
    """
    providers = session_providers(device)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:
        raise ExportMismatchError(f"{path.name}: onnxruntime does not take it: {error}") from error
    if device == "cuda" and PROVIDERS["cuda"] not in session.get_providers():  # it falls back without a word
        raise UnsupportedDeviceError(f"device cuda: onnxruntime has {PROVIDERS['cuda']}, but cannot load it here")
    return session


def verify(path: Path, cases: Iterable[Case]) -> tuple[Check, ...]:
    """Run every case and compare every output.

    Args:
        path: the file.
        cases: at least one of them of the largest size.

    Returns:
        one check per output, over all cases.

    Raises:
        ExportMismatchError: a case cannot be run, or an output has another name, dtype or shape, differs by more than
            the tolerance, or could not be compared; the message names file, output, largest error and tolerance.
    """
    session = open_session(path)
    names = [output.name for output in session.get_outputs()]
    tallies: dict[str, Tally] = {}
    for case in cases:
        try:
            values = session.run(None, {name: tensor.numpy() for name, tensor in case.inputs.items()})
        except Exception as error:
            raise ExportMismatchError(f"{path.name}: onnxruntime fails on {case.size} rows: {error}") from error
        if set(names) != set(case.outputs):
            raise ExportMismatchError(f"{path.name}: outputs are {names}, torch has {list(case.outputs)}")
        for name, got in zip(names, values, strict=True):
            tally = tallies.setdefault(name, Tally(name))
            tally.compare(f"{path.name}: output {name}", got, case.outputs[name], case.size)
    return tuple(tallies[name].check() for name in names)
