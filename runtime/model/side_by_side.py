"""Bytes of units out of an open blob: those that lie side by side come in one read, each into memory of its own.

It knows nothing of what the bytes are; `runtime.model.repertoire` opens the blob and checks what is read.
Read first: a set's units lie one after the other by layer, so whoever reads the first will want the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from runtime.errors import BlobTruncatedError, TensorMismatchError
from runtime.model.expert import blob_header
from runtime.model.manifest import ExpertSet, Unit

_MAX_HEADER_BYTES = 16 << 20

Allocate = Callable[[int], memoryview]
"""Gives memory of so many bytes, with anything in it."""


def fresh_memory(num_bytes: int) -> memoryview:
    """New memory."""
    return memoryview(bytearray(num_bytes))


def read_side_by_side(descriptor: int, entry: ExpertSet, units: Sequence[Unit], allocate: Allocate) -> list[memoryview]:
    """Read units of an open blob. With the first of the set among them, the disk is told to go on with the others.

    Raises:
        BlobTruncatedError: the blob ends before a unit does.
    """
    if entry.units[0] in units and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, entry.units[0].offset, 0, os.POSIX_FADV_WILLNEED)
    buffers = [allocate(unit.bytes) for unit in units]
    begin = 0
    for end, unit in enumerate(units, start=1):
        if end < len(units) and units[end].offset == unit.offset + unit.bytes:
            continue
        run = units[begin:end]
        if os.preadv(descriptor, buffers[begin:end], run[0].offset) != sum(each.bytes for each in run):
            raise BlobTruncatedError(f"blob {entry.digest}: layers {run[0].layer} to {unit.layer} end early")
        begin = end
    return buffers


def read_header(descriptor: int, entry: ExpertSet) -> tuple[dict[str, dict[str, list[int]]], int]:
    """The tensor entries of an open blob, and where their data begin.

    Raises:
        TensorMismatchError: there is no such header.
    """
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if not 0 < length <= min(_MAX_HEADER_BYTES, entry.bytes - 8):
        raise TensorMismatchError(f"blob {entry.digest}: a header of {length} bytes cannot be right")
    try:
        return blob_header(os.pread(descriptor, 8 + length, 0))
    except ValueError as error:
        raise TensorMismatchError(f"blob {entry.digest}: the header is not JSON") from error
