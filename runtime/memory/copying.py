"""How experts come onto a device: the order of copies and of the kernels that read what lies there.

It knows nothing of experts or room.
Read first: two promises. What `copy` wrote can be read by kernels queued after it returned; and a copy begins after
all kernels that were queued when the newest mark was made, so room that is used again is not overwritten under a
kernel that still reads what lay there. `SlabTier` marks whenever room is taken.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import torch

Copies = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""(where to, where from), of equal shapes."""


class Copier(Protocol):
    """Copies into device memory; any thread."""

    def mark(self) -> None:
        """Later copies begin after every kernel that is queued by now."""

    def copy(self, copies: Copies) -> None:
        """Copy, and return when all of it is there."""


class HostCopier:
    """Where the device is the CPU: nothing is ever queued."""

    def mark(self) -> None:
        """See `Copier`."""

    def copy(self, copies: Copies) -> None:
        """See `Copier`."""
        for target, source in copies:
            target.copy_(source)


class Queues(Protocol):
    """What `QueuedCopier` asks of a device's queues; `CudaQueues` on a GPU."""

    def record_compute(self) -> object:
        """An event behind all kernels that are queued on the stream that computes."""

    def wait_on_copies(self, event: object) -> None:
        """The stream that copies goes on when the event has happened; the caller does not wait."""

    def pinned(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """A buffer in host memory that the device reads by itself."""

    def queue_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue one copy from a pinned buffer on the stream that copies."""

    def finish_copies(self) -> None:
        """Wait until all queued copies are done."""


class QueuedCopier:
    """Copies over one pinned buffer on a stream of their own.

    Args:
        queues: of the device.
        dtype: of what is copied.
    """

    def __init__(self, queues: Queues, dtype: torch.dtype) -> None:
        self._queues, self._dtype = queues, dtype
        self._copying = threading.Lock()  # one at a time: there is one stream and one buffer
        self._lock = threading.Lock()  # guards `_marked`
        self._marked: object | None = None
        self._buffer = torch.empty(0, dtype=dtype)

    def mark(self) -> None:
        """See `Copier`."""
        event = self._queues.record_compute()
        with self._lock:
            self._marked = event  # later than those before it, on the same stream

    def copy(self, copies: Copies) -> None:
        """See `Copier`."""
        with self._copying:
            self._copy(copies)

    def _copy(self, copies: Copies) -> None:
        with self._lock:
            marked, self._marked = self._marked, None
        if marked is not None:
            self._queues.wait_on_copies(marked)
        size = sum(source.numel() for _, source in copies)
        if self._buffer.numel() < size:
            self._buffer = self._queues.pinned(size, self._dtype)
        begin = 0
        for target, source in copies:
            staged = self._buffer[begin : begin + source.numel()].view(source.shape)
            staged.copy_(source)
            self._queues.queue_copy(target, staged)
            begin += source.numel()
        self._queues.finish_copies()  # the buffer is free again, and whoever asked may compute


class CudaQueues:
    """The streams of a CUDA device: torch's default one computes, another copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record_compute(self) -> object:
        """See `Queues`."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.default_stream(self._device))
        return event

    def wait_on_copies(self, event: object) -> None:
        """See `Queues`."""
        assert isinstance(event, torch.cuda.Event), "our own"
        self._stream.wait_event(event)

    def pinned(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """See `Queues`."""
        return torch.empty(count, dtype=dtype, pin_memory=True)

    def queue_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `Queues`."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def finish_copies(self) -> None:
        """See `Queues`."""
        self._stream.synchronize()


def make_copier(device: torch.device, dtype: torch.dtype) -> Copier:
    """The copier of a device."""
    return QueuedCopier(CudaQueues(device), dtype) if device.type == "cuda" else HostCopier()
