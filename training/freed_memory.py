"""Freed memory stays with the process during training, instead of going back to the system at every step.

It does not know what is trained.
Read first: a training step makes and drops the same large tensors over and over. The C library gives each of them back
at once, and the system then hands out empty pages anew, one fault per page: a fifth of a step on the CPU.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of `mallopt` in malloc.h
_LIMIT = 2**31 - 1


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
    return all([mallopt(_MMAP_THRESHOLD, _LIMIT), mallopt(_TRIM_THRESHOLD, _LIMIT)])
