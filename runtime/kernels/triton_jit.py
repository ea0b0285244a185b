"""Runs the mixture kernels through Triton's own compiler, which compiles each variant when it is first launched.

It knows nothing of mixtures.
Read first: tensors lie on the current CUDA device; with TRITON_INTERPRET=1 in the environment, when this is imported
first, Triton interprets the same source on a CPU. What differs from launch to launch is not specialised on, so that no
batch size compiles anew.
"""

from __future__ import annotations

import inspect
from typing import Any

import triton

from runtime.kernels import triton_kernels
from runtime.kernels.triton_mixture import Launch

_VARYING = frozenset(
    {"num_columns", "above_rank", "up_to_rank", "num_tokens", "num_splits", "max_tile_experts", "x_stride", "y_stride"}
)
_NUM_WARPS = 4


class JitLauncher:
    """Launches kernels on the current stream."""

    def __init__(self) -> None:
        self._kernels: dict[str, Any] = {}

    def __call__(self, launch: Launch) -> None:
        """Queue one kernel."""
        name = launch.variant.kernel
        if name not in self._kernels:
            function = getattr(triton_kernels, name)
            varying = sorted(_VARYING & inspect.signature(function).parameters.keys())
            self._kernels[name] = triton.jit(function, do_not_specialize=varying)
        self._kernels[name][launch.grid](**launch.arguments, **launch.variant.constants, num_warps=_NUM_WARPS)
