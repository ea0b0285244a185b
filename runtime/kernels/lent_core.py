"""A core that a step lends to threads which compute beside it.

It knows nothing of what they compute.
Read first: a step that uses every core stands still while one of its threads is without one. A thread that tells when
it computes (`beside`), and when it only waits meanwhile (`waiting`), gets a core that the step does without.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Lender(Protocol):
    """Who lends; called by the thread that it lends to."""

    def lend(self) -> None:
        """This thread needs a core from now on; returns once it has one."""

    def take_back(self) -> None:
        """It needs none any more."""


class _Here(threading.local):
    lender: Lender | None = None


_here = _Here()


@contextmanager
def beside(lender: Lender | None) -> Iterator[None]:
    """While the block runs, this thread computes; None lends nothing. Blocks do not nest."""
    if lender is None:
        yield
        return
    lender.lend()
    _here.lender = lender
    try:
        yield
    finally:
        _here.lender = None
        lender.take_back()


@contextmanager
def waiting() -> Iterator[None]:
    """While the block runs, this thread waits, for a disk perhaps; nothing happens where it has no core lent."""
    lender = _here.lender
    if lender is None:
        yield
        return
    lender.take_back()
    try:
        yield
    finally:
        lender.lend()
