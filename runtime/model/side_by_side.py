"""Bytes of units out of an open blob: those that lie side by side come in one read, each into memory of its own.

It knows nothing of what the bytes are; `runtime.model.repertoire` opens the blob and checks what is read.
Read first: a set's units lie one after the other by layer, so whoever reads the first will want the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from runtime.errors import BlobTruncatedError, TensorMismatchError
from runtime.model.manifest import ExpertSet, Unit

_MAX_HEADER_BYTES = 16 << 20

Allocate = Callable[[int], memoryview]
"""Gives memory of so many bytes, with anything in it."""


def fresh_memory(num_bytes: int) -> memoryview:
    """New memory."""
    return memoryview(bytearray(num_bytes))


def read_side_by_side(descriptor: int, entry: ExpertSet, units: Sequence[Unit], allocate: Allocate) -> list[memoryview]:
    """Read units of an open blob.

    Where the first of the set is among them and is not in the page cache, the disk is told to go on with the others.

    Raises:
        BlobTruncatedError: the blob ends before a unit does.
    """
    buffers = [allocate(unit.bytes) for unit in units]
    begin = 0
    for end, unit in enumerate(units, start=1):
        if end < len(units) and units[end].offset == unit.offset + unit.bytes:
            continue
        run = units[begin:end]
        size = sum(each.bytes for each in run)
        cached = _read_cached(descriptor, buffers[begin:end], run[0].offset)
        if cached != size:
            if not cached and run[0] is entry.units[0] and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, run[0].offset, 0, os.POSIX_FADV_WILLNEED)
            if os.preadv(descriptor, buffers[begin:end], run[0].offset) != size:
                raise BlobTruncatedError(f"blob {entry.digest}: layers {run[0].layer} to {unit.layer} end early")
        begin = end
    return buffers


def _read_cached(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
    """As much as the page cache gives without a disk; 0 where the system cannot tell."""
    try:
        return os.preadv(descriptor, buffers, offset, os.RWF_NOWAIT)
    except (OSError, AttributeError):  # nothing is there; a file system, or a system, that does not know the flag
        return 0


def read_header(descriptor: int, entry: ExpertSet) -> bytes:
    """The JSON at the beginning of an open blob.

    Raises:
        TensorMismatchError: there is no such header.
    """
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if not 0 < length <= min(_MAX_HEADER_BYTES, entry.bytes - 8):
        raise TensorMismatchError(f"blob {entry.digest}: a header of {length} bytes cannot be right")
    return os.pread(descriptor, length, 8)
