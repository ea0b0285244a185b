"""Records what a function queues on a CUDA device, so that it is queued again as one: a CUDA graph.

It knows nothing of steps.
Read first: a replay does what was recorded on the same addresses. Whatever the function reads must stay where it is;
what it decides in Python is decided once; it must neither wait for the device nor copy from the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from runtime.errors import UnsupportedDeviceError
from runtime.kernels.step_kinds import GraphKind

_WARM_UPS = 2  # libraries choose and load kernels, and Triton compiles, when something runs first: not in a recording


@dataclass(frozen=True)
class Captured:
    """What was recorded: `replay` queues it again; it holds `num_bytes` of the device for what is in between."""

    replay: Callable[[], object]
    num_bytes: int


Capture = Callable[[Callable[[], None]], Captured]
"""Records a function that may be run more often than once; what it computed counts for nothing before a replay.

Raises UnsupportedDeviceError where that cannot be had.
"""


class CudaCapture:
    """Records on one device; all recordings share a pool of memory, so that only one may run at a time.

    Args:
        device: with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Captured:
        """Run it a few times on a side stream, then record it. Copies that other threads queue go on meanwhile."""
        try:
            with torch.cuda.device(self._device):
                return self._captured(run, torch.cuda.current_stream())
        except RuntimeError as error:
            raise UnsupportedDeviceError(f"device {self._device}: a step could not be recorded: {error}") from error

    def _captured(self, run: Callable[[], None], current: torch.cuda.Stream) -> Captured:
        try:
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    run()
            current.wait_stream(self._stream)
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                run()
            return Captured(graph.replay, max(0, torch.cuda.memory_reserved() - before))
        finally:
            torch.cuda.set_stream(current)  # a recording that fails leaves its own stream behind


def step_capture(device: torch.device, kind: GraphKind) -> Capture | None:
    """What records steps on a device; None where steps are not recorded: on a CPU, or where nobody wants it."""
    return CudaCapture(device) if kind == "auto" and device.type == "cuda" else None
