"""Accounts: the bytes that are resident, reserved and guessed, in all and per tenant, and what tenants are promised.

It knows nothing of what the bytes are.
Read first: `claimed = reserved + sum over tenants of max(0, floor - reserved by the tenant)` never exceeds the budget.
So what is reserved can always be loaded by evicting what nobody holds, without touching what a floor protects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


class Accounts:
    """Sums of bytes; changed under the memory's lock.

    Args:
        budget: of all.
        floors: tenant -> bytes of its idle experts that the traffic of others leaves alone.
    """

    def __init__(self, budget: int, floors: Mapping[str, int]) -> None:
        self.budget = budget
        self.floors = dict(floors)
        self.resident = self.reserved = 0
        self.resident_of: Counter[str] = Counter()
        self.reserved_of: Counter[str] = Counter()
        self.guessed_of: Counter[str] = Counter()

    def add_resident(self, owner: str, num_bytes: int) -> None:
        """Bytes of this owner came into memory; negative ones left it."""
        self.resident += num_bytes
        self.resident_of[owner] += num_bytes

    def add_reserved(self, owner: str, num_bytes: int) -> None:
        """Bytes of this owner are held from now on; negative ones are not any more."""
        self.reserved += num_bytes
        self.reserved_of[owner] += num_bytes

    def add_guessed(self, owner: str, num_bytes: int) -> None:
        """Bytes of this owner are foreseen from now on; negative ones are not any more."""
        self.guessed_of[owner] += num_bytes

    def can_guess(self, fresh: Counter[str]) -> bool:
        """Whether guesses may name these bytes too, by owner: all that they name could still be reserved."""
        return self.can_reserve(self.guessed_of + fresh)

    def owner(self, owner: str, tenant: str) -> str:
        """Whose a thing of `owner` is once `tenant` has reserved it: the first tenant with a floor keeps it."""
        return tenant if tenant in self.floors and owner not in self.floors else owner

    def can_reserve(self, fresh: Mapping[str, int]) -> bool:
        """Whether these bytes, owner -> bytes that nobody has reserved, may be reserved and all promises kept."""
        return self.claimed(fresh) <= self.budget

    def claimed(self, fresh: Mapping[str, int] | None = None) -> int:
        """Bytes that are reserved, or kept back for tenants that have reserved less than their floor.

        Args:
            fresh: owner -> bytes that would be reserved too.
        """
        more = fresh or {}
        gaps = (floor - self.reserved_of[name] - more.get(name, 0) for name, floor in self.floors.items())
        return self.reserved + sum(more.values()) + sum(max(0, gap) for gap in gaps)

    def kept_from(self, tenant: str) -> int:
        """Bytes that `tenant` can never have: the floors of others."""
        return sum(floor for name, floor in self.floors.items() if name != tenant)

    def protects(self, owner: str, tenant: str, *, but: int = 0) -> bool:
        """Whether a load for `tenant` must leave the owner's idle experts alone, once `but` bytes of them have gone."""
        return owner in self.floors and owner != tenant and self.resident_of[owner] - but <= self.floors[owner]

    def check(self) -> None:
        """Assert that the sums fit together and keep the budget."""
        assert self.resident == sum(self.resident_of.values()), "resident bytes of tenants drifted"
        assert self.reserved == sum(self.reserved_of.values()), "reserved bytes of tenants drifted"
        assert self.resident <= self.budget, "resident bytes exceed the budget"
        assert self.claimed() <= self.budget, "reserved bytes and floors exceed the budget"
