"""What the disk must bring first: bytes of an open file into the page cache.

It knows nothing of what the bytes are.
Read first: loads read what is there already; this is for what is not.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

_FAR = 2 << 20
_DEVICES = Path("/sys/class/bdi")


def bring(descriptor: int, begin: int, end: int, *, more: bool) -> None:
    """Wait until these bytes are in the page cache, as far as that can be known.

    Where the system reads far ahead on its own, they are sent to nowhere in order, which copies nothing: what follows
    is then on its way too, and large pages hold it, which costs the processor less than being told. Elsewhere the disk
    is told all at once, since many reads in flight are what a distant one needs.

    Args:
        descriptor: of the file.
        begin: first byte.
        end: behind the last.
        more: all that follows will be wanted too.
    """
    if reads_far_ahead(os.fstat(descriptor).st_dev) and _send_to_nowhere(descriptor, begin, end):
        return
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, begin, 0 if more else end - begin, os.POSIX_FADV_WILLNEED)  # 0: to the end
    os.pread(descriptor, 1, end - 1)  # a disk brings what it was told in this order, so the rest is there too


def _send_to_nowhere(descriptor: int, begin: int, end: int) -> bool:
    """False where it cannot be done; if it is the disk that refuses, whoever reads will be told."""
    try:
        while begin < end and (sent := os.sendfile(_nowhere(), descriptor, begin, end - begin)):
            begin += sent
    except OSError:  # a file system without it
        return False
    return True


@cache
def _nowhere() -> int:
    return os.open(os.devnull, os.O_WRONLY)


@cache
def reads_far_ahead(device: int) -> bool:
    """Whether the system reads megabytes ahead of who reads from a device in order; False where that is not known."""
    try:
        text = (_DEVICES / f"{os.major(device)}:{os.minor(device)}" / "read_ahead_kb").read_text()
    except OSError:
        return False
    return int(text) << 10 >= _FAR
