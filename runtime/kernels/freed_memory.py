"""Gives memory that was freed back to the machine, where the C library keeps it for later.

It knows nothing of who used it.
Read first: loading a model frees several times what it keeps, in pieces that malloc holds on to; nothing changes but
what other processes see of ours.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of `mallopt` in malloc.h
_LARGE_BYTES, _USUAL_BYTES = 1 << 18, 1 << 25  # the second is what glibc's own threshold grows to


def give_back() -> None:
    """Return free pages of the heap where the C library can (glibc); else nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


@contextmanager
def given_back_at_once() -> Iterator[None]:
    """Inside, large pieces come from the machine one by one and go back when they are freed, in all threads (glibc).

    Else they leave gaps in the heap, and matrices of different sizes that come and go make it grow to twice a model.
    A process that computes wants the opposite, and has it again afterwards: pieces below 32 MB stay in the heap.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _USUAL_BYTES)
        mallopt(_TRIM_THRESHOLD, 2 * _USUAL_BYTES)
