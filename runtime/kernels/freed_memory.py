"""Gives memory that was freed back to the machine, where the C library keeps it for later.

It knows nothing of who used it.
Read first: loading a model frees as much as it keeps, in pieces that malloc holds on to; nothing changes but what other
processes see of ours.
"""

from __future__ import annotations

import ctypes
import gc


def give_back() -> None:
    """Collect garbage, and return free pages of the heap where the C library can (glibc); else nothing."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
