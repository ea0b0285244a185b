"""Bytes of weights as they come from a file, and what must be asked of them: SHA-256, and whether they are numbers.

It knows nothing of experts; whoever asks compares the digests.
Read first: both ways give the same. The native one reads a stretch, looks at it and hashes it while the processor's
cache holds it, two pieces side by side, since SHA instructions (FIPS 180-4) spend most of their time waiting for each
other.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch

_EXPONENT = {torch.float32: 0x7F80_0000, torch.bfloat16: 0x7F80_7F80, torch.float16: 0x7C00_7C00}
_KNOWN = (b"abcd" * 50, b"efgh" * 70, b"")  # two that are hashed side by side, and one alone
_DIGEST_BYTES = 32


class Inspected(NamedTuple):
    """Bytes, their SHA-256 (64 hexadecimal digits), and whether no number in them is NaN or infinite."""

    data: memoryview
    sha256: str
    finite: bool


class Inspector:
    """Looks at memory with hashlib and torch; the dtype is float32, bfloat16 or float16."""

    def look(self, pieces: Sequence[memoryview], dtype: torch.dtype) -> list[Inspected]:
        """Look at pieces of memory."""
        return [Inspected(piece, hashlib.sha256(piece).hexdigest(), _finite(piece, dtype)) for piece in pieces]

    def read(
        self, descriptor: int, place: int, pieces: Sequence[memoryview], dtype: torch.dtype, *, wait: bool
    ) -> list[Inspected]:
        """Fill pieces from an open file, and look at them.

        Args:
            descriptor: of the file.
            place: where the first begins in it; each other follows the one before.
            pieces: memory to fill.
            dtype: of the numbers.
            wait: for a disk; else only what is in the page cache is read.

        Returns:
            the first of them, as far as they can be had whole: the file may end, the page cache lack one, or the system
            not know what is in it.

        Raises:
            OSError: the disk refuses; only where it may wait.
        """
        got = os.preadv(descriptor, pieces, place) if wait else read_cached(descriptor, pieces, place)
        ends = accumulate(piece.nbytes for piece in pieces)
        return self.look([piece for piece, end in zip(pieces, ends, strict=True) if end <= got], dtype)


class NativeInspector(Inspector):
    """The same in native code.

    Args:
        library: from `runtime.kernels.native_build.build`.
        model: of this library, whose threads look while they compute; None leaves it to the thread that asks.

    On a processor without SHA instructions it does as `Inspector` does.
    """

    def __init__(self, library: Path, *, model: ctypes.c_void_p | None = None) -> None:
        self._model = model
        self._inspect = ctypes.CDLL(str(library)).gr_inspect
        self._inspect.restype = ctypes.c_int64

    def look(self, pieces: Sequence[memoryview], dtype: torch.dtype) -> list[Inspected]:
        """As `Inspector.look`."""
        found = self._run(-1, 0, pieces, dtype, wait=False)
        return super().look(pieces, dtype) if found is None else found

    def read(
        self, descriptor: int, place: int, pieces: Sequence[memoryview], dtype: torch.dtype, *, wait: bool
    ) -> list[Inspected]:
        """As `Inspector.read`."""
        found = self._run(descriptor, place, pieces, dtype, wait=wait)
        return super().read(descriptor, place, pieces, dtype, wait=wait) if found is None else found

    def _run(
        self, descriptor: int, place: int, pieces: Sequence[memoryview], dtype: torch.dtype, *, wait: bool
    ) -> list[Inspected] | None:
        count = len(pieces)
        addresses = (ctypes.c_void_p * count)(*(address_of(piece) for piece in pieces))
        sizes = (ctypes.c_int64 * count)(*(piece.nbytes for piece in pieces))
        digests, finite = (ctypes.c_char * (_DIGEST_BYTES * count))(), (ctypes.c_char * count)()
        where = (self._model, descriptor, int(wait), ctypes.c_int64(place), addresses, sizes, ctypes.c_int64(count))
        done = self._inspect(*where, ctypes.c_uint32(_EXPONENT[dtype]), digests, finite)
        if done == -1:
            return None
        if done < 0:
            raise OSError(-1 - done, os.strerror(-1 - done))
        hexadecimal, width = digests.raw.hex(), 2 * _DIGEST_BYTES
        return [Inspected(pieces[i], hexadecimal[width * i : width * (i + 1)], finite.raw[i] == 1) for i in range(done)]


def native_inspector(library: Path, *, model: ctypes.c_void_p | None = None) -> Inspector:
    """A `NativeInspector`, unless it gives another digest of known bytes than hashlib."""
    known = [memoryview(bytearray(text)) for text in _KNOWN]
    native = NativeInspector(library, model=model)
    return native if native.look(known, torch.float32) == Inspector().look(known, torch.float32) else Inspector()


def read_cached(descriptor: int, pieces: Sequence[memoryview | bytearray], place: int) -> int:
    """Fill pieces with what the page cache has of an open file: how many bytes, 0 where that cannot be known."""
    try:
        return os.preadv(descriptor, pieces, place, os.RWF_NOWAIT)
    except (OSError, AttributeError):  # nothing is there; a file system, or a system, without the flag
        return 0


def all_finite(numbers: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite: then their sum is finite too, unless they are huge."""
    return math.isfinite(numbers.sum().item()) or bool(numbers.isfinite().all())


def _finite(piece: memoryview, dtype: torch.dtype) -> bool:
    return not piece.nbytes or all_finite(torch.frombuffer(piece, dtype=dtype))


def address_of(piece: memoryview) -> int:
    """Where writable memory begins; 0 where it is empty."""
    return ctypes.addressof(ctypes.c_char.from_buffer(piece)) if piece.nbytes else 0
