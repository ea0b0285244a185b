"""Leases: a reader holds a generation, and the collector leaves what is held alone.

It knows nothing of what a generation is; a lease is a lock (flock) on the manifest's file itself.
Read first: readers share the lock, the collector wants it alone and does not wait; the kernel drops a lock with the
process that held it, so nothing is left behind by a crash, and a reader needs no right to write.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def shared_lease(path: Path) -> Iterator[bool]:
    """Hold the file at `path` together with other readers; yields False if it is not there, or just went.

    Waits only while a collector is removing it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        # The collector removes a file only while it holds it alone: what is still here stays while we hold it.
        yield _is_at(path, descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def sole_lease(path: Path) -> Iterator[bool]:
    """Hold the file at `path` alone; yields False, and does not wait, if a reader holds it.

    Raises:
        FileNotFoundError: it is not there.
    """
    descriptor = os.open(path, os.O_RDWR)  # locks over NFS need the right to write
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
