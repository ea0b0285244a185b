"""The names of what a user may choose about the step: the form of the base's weights, and who computes.

It knows nothing of either; it imports no torch, so that command lines can list the choices.
Read first: these are the spellings everywhere, on the command line and in configuration files.
"""

from typing import Literal

WeightKind = Literal["float32", "bfloat16", "int8", "int4"]
"""In which form the matrices of a base are kept."""

KEPT_IN_8_BITS = frozenset({"qkv", "out", "down", "head"})
"""Matrices that "int4" keeps as "int8" does: in 4 bits they cost most, for their size."""

StepKind = Literal["auto", "native", "torch"]
"""Who computes a step: our compiled code, torch's operations, or the first where it runs."""

GraphKind = Literal["auto", "off"]
"""Whether decode steps on CUDA devices are recorded once and replayed; see `runtime.engine.decode_graphs`."""

DeviceKind = Literal["auto", "cpu", "cuda"]
"""Where a step is computed; "auto" is the first CUDA device where torch sees one."""
