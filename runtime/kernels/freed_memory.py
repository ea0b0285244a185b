"""What becomes of memory that was freed: the C library keeps it for later, or gives it back to the machine.

It knows nothing of who used it.
Read first: loading a model frees several times what it keeps, in pieces that malloc holds on to, so there it should go
back. A training step makes and drops the same large tensors over and over; where each goes back at once, the system
hands out empty pages anew, one fault per page: a fifth of a step on the CPU. No result depends on either.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of `mallopt` in malloc.h
_LARGE_BYTES, _USUAL_BYTES = 1 << 18, 1 << 25  # the second is what glibc's own threshold grows to
_MOST_BYTES = 2**31 - 1


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


def keep_freed_memory() -> bool:
    """Ask the C library to keep what is freed; for the rest of the process.

    Returns:
        whether it does: only glibc can be asked.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(_MMAP_THRESHOLD, _MOST_BYTES), mallopt(_TRIM_THRESHOLD, _MOST_BYTES)])
