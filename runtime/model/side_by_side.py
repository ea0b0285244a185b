"""Bytes of units out of an open blob: those that lie side by side come in one read, each into memory of its own.

It knows nothing of what the bytes are; `runtime.model.repertoire` opens the blob and checks what is read.
Read first: a set's units lie one after the other by layer, so whoever reads the first will want the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from runtime.errors import BlobTruncatedError, TensorMismatchError
from runtime.kernels.inspection import Inspected, Inspector, read_cached
from runtime.model.expert import DTYPES
from runtime.model.manifest import ExpertSet, Unit
from runtime.model.page_cache import bring

_MAX_HEADER_BYTES = 16 << 20

Allocate = Callable[[Sequence[int]], list[memoryview]]
"""Gives pieces of memory of so many bytes each, with anything in them."""


def fresh_memory(sizes: Sequence[int]) -> list[memoryview]:
    """New memory."""
    return [memoryview(bytearray(size)) for size in sizes]


def read_side_by_side(
    descriptor: int, entry: ExpertSet, units: Sequence[Unit], allocate: Allocate, inspector: Inspector
) -> list[Inspected]:
    """Read units of an open blob, and look at what was read.

    Raises:
        BlobTruncatedError: the blob ends before a unit does.
    """
    buffers = allocate([unit.bytes for unit in units])
    read: list[Inspected] = []
    for end, unit in enumerate(units, start=1):
        if end == len(units) or units[end].offset != unit.offset + unit.bytes:
            begin = len(read)
            read += _read_run(descriptor, entry, units[begin:end], buffers[begin:end], inspector)
    return read


def _read_run(
    descriptor: int, entry: ExpertSet, units: Sequence[Unit], buffers: Sequence[memoryview], inspector: Inspector
) -> list[Inspected]:
    """Units that lie one after the other: those in the page cache, those that the disk brings there, and the rest."""
    dtype = DTYPES[entry.dtype]
    read = inspector.read(descriptor, units[0].offset, buffers, dtype, wait=False)
    for wait in (False, True):
        left = len(read)
        if left == len(units):
            break
        if not wait:
            _bring(descriptor, entry, units[left:])
        read += inspector.read(descriptor, units[left].offset, buffers[left:], dtype, wait=wait)
    if len(read) != len(units):
        raise BlobTruncatedError(f"blob {entry.digest}: layer {units[len(read)].layer} ends early")
    return read


def bring_absent(descriptor: int, entry: ExpertSet, units: Sequence[Unit]) -> None:
    """Where the page cache lacks the beginning of a blob, wait for that and for these units at once.

    The others follow by themselves where these are the first of the set.
    """
    if read_cached(descriptor, [bytearray(1)], 0) == 0:
        _bring(descriptor, entry, units)


def _bring(descriptor: int, entry: ExpertSet, units: Sequence[Unit]) -> None:
    whole = units[0] is entry.units[0]
    bring(descriptor, 0 if whole else units[0].offset, units[-1].offset + units[-1].bytes, more=whole)


def read_header(descriptor: int, entry: ExpertSet) -> bytes:
    """The JSON at the beginning of an open blob.

    Raises:
        TensorMismatchError: there is no such header.
    """
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if not 0 < length <= min(_MAX_HEADER_BYTES, entry.bytes - 8):
        raise TensorMismatchError(f"blob {entry.digest}: a header of {length} bytes cannot be right")
    return os.pread(descriptor, length, 8)
