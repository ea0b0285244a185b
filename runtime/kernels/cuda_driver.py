"""The calls of the CUDA driver that loading and launching a compiled kernel take, through ctypes.

It knows nothing of tensors or of what a kernel computes.
Read first: a context must be current on the calling thread; torch makes one when it first uses the device there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from runtime.errors import UnsupportedDeviceError

Parameter = ctypes.c_void_p | ctypes.c_int32

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SHARED_WITHOUT_ASKING = 48 * 1024


class Driver:
    """The driver's library.

    Args:
        library: its name.

    Raises:
        UnsupportedDeviceError: it is not there.
    """

    def __init__(self, library: str = "libcuda.so.1") -> None:
        try:
            self._cuda = ctypes.CDLL(library)
        except OSError as error:
            raise UnsupportedDeviceError(f"the CUDA driver cannot be loaded: {error}") from error

    def load(self, cubin: bytes, symbol: str, shared_bytes: int) -> int:
        """Load a cubin, for as long as the context lives, and return the handle of its kernel.

        Raises:
            UnsupportedDeviceError: the driver refuses; the message gives its reason.
        """
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(cubin))
        self._call("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(symbol.encode()))
        if shared_bytes > _SHARED_WITHOUT_ASKING:
            self._call("cuFuncSetAttribute", function, ctypes.c_int(_MAX_DYNAMIC_SHARED), ctypes.c_int(shared_bytes))
        assert function.value is not None, "a loaded kernel has a handle"
        return function.value

    def launch(
        self,
        function: int,
        *,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        stream: int,
        parameters: Sequence[Parameter],
    ) -> None:
        """Queue a kernel on a stream.

        Args:
            function: from `load`.
            grid: programs per axis.
            threads: per program.
            shared_bytes: dynamic shared memory per program.
            stream: handle, 0 for the default stream.
            parameters: in the kernel's order.

        Raises:
            UnsupportedDeviceError: the driver refuses; the message gives its reason.
        """
        places = (ctypes.c_void_p * len(parameters))(*map(ctypes.addressof, parameters))
        self._call(
            "cuLaunchKernel",
            ctypes.c_void_p(function),
            *map(ctypes.c_uint, (*grid, threads, 1, 1, shared_bytes)),
            ctypes.c_void_p(stream),
            places,
            None,
        )

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(code, ctypes.byref(text))
            raise UnsupportedDeviceError(f"{name}: CUDA error {code}, {(text.value or b'unknown').decode()}")
