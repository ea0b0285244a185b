"""Runs Triton kernels on a CPU under Triton's interpreter: slow, and the same source that is compiled.

It knows nothing of mixtures.
Read first: it is for tests and for verifying exports. The interpreter replaces parts of `triton.language` while a
kernel runs, so nothing else in the process may compile or interpret a kernel meanwhile; a lock sees to the latter.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, TensorHandle, interpreter_builder

from runtime.kernels import triton_kernels
from runtime.kernels.triton_mixture import Launch

_running = threading.Lock()


def interpret(launch: Launch, *, kernels: ModuleType = triton_kernels) -> None:
    """Run one kernel over its whole grid, one program after the other, on tensors in host memory.

    Args:
        launch: what to run.
        kernels: where the kernel is defined.
    """
    kernel = InterpretedFunction(getattr(kernels, launch.variant.kernel))
    with _running, _bfloat16_products():
        kernel[launch.grid](**launch.arguments, **launch.variant.constants)


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Widen bfloat16 factors of a dot, whose bits the interpreter would multiply as if they were integers."""
    dot = interpreter_builder.create_dot

    def widened(a: Any, b: Any, *rest: Any) -> Any:  # noqa: ANN401 - the interpreter is not typed
        return dot(_float32(a), _float32(b), *rest)

    interpreter_builder.create_dot = widened
    try:
        yield
    finally:
        interpreter_builder.create_dot = dot


def _float32(handle: Any) -> Any:  # noqa: ANN401
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
