"""Headers of blobs that were found right: each is read and checked once.

It knows nothing of what the tensors hold.
Read first: two threads that begin with the same blob do not both do the work.
"""

from __future__ import annotations

import threading

from runtime.model.expert import check_header
from runtime.model.manifest import BaseRef, ExpertSet
from runtime.model.side_by_side import read_header


class CheckedHeaders:
    """Safe to share between threads."""

    def __init__(self) -> None:
        self._digests: set[str] = set()
        self._lock = threading.Lock()

    def check(self, descriptor: int, entry: ExpertSet, base: BaseRef) -> None:
        """Check the header of an open blob, unless that was done before.

        Raises:
            TensorMismatchError: see `runtime.model.expert.check_header`.
        """
        if entry.digest in self._digests:
            return
        with self._lock:
            if entry.digest not in self._digests:
                check_header(read_header(descriptor, entry), entry, base)
                self._digests.add(entry.digest)
