"""The tier that kernels read from: host memory itself on a CPU, slabs on a device.

It knows nothing of disks or budgets of the host tier; `runtime.memory.memory` asks it under its own lock, except `put`.
Read first: a tier is inclusive: what it holds is in host memory too. Room is taken when a set is held, before anything
is read, so that what has been reserved always finds its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from runtime.memory.keys import UnitKey
from runtime.memory.wanted import Held, Wanted


class Tier(Protocol):
    """Where the engine's kernels find experts."""

    def check_fits(self, wanted: Sequence[Wanted]) -> None:
        """Raise BudgetError if even an empty tier could not hold all of these. Changes nothing."""

    def hold(self, wanted: Sequence[Wanted], gone: list[UnitKey]) -> bool:
        """Take room for all of these, or for none, where what others hold leaves too little; False then.

        Appends to `gone` what had to go, even where that did not help.
        """

    def claim(self, wanted: Wanted) -> bool:
        """Hold one thing once more if it has room here; True if so."""

    def let_go(self, key: UnitKey) -> None:
        """End one `hold` or `claim`; the thing may stay until its room is needed."""

    def forget(self, key: UnitKey) -> None:
        """Drop a thing that nobody holds; nothing happens if it is not here."""

    def put(self, key: UnitKey, value: Held) -> Held:
        """Bring a thing into its place, and return what kernels may read. Blocks until it is there."""

    def check_integrity(self) -> None:
        """Assert that the tier's own sums are right."""


class HostTier:
    """On a CPU kernels read host memory: nothing is copied, and the host budget is the only one."""

    def check_fits(self, wanted: Sequence[Wanted]) -> None:
        """Nothing to check."""

    def hold(self, wanted: Sequence[Wanted], gone: list[UnitKey]) -> bool:  # noqa: ARG002 - part of the interface
        """Always."""
        return True

    def claim(self, wanted: Wanted) -> bool:  # noqa: ARG002 - part of the interface
        """Always."""
        return True

    def let_go(self, key: UnitKey) -> None:
        """Nothing to do."""

    def forget(self, key: UnitKey) -> None:
        """Nothing to do."""

    def put(self, key: UnitKey, value: Held) -> Held:  # noqa: ARG002 - part of the interface
        """The thing itself."""
        return value

    def check_integrity(self) -> None:
        """Nothing to check."""
