"""Residency: which expert sets are in memory, on their way or quarantined, as people ask for it.

It knows nothing of how they came there.
Read first: one row per expert set, and one per task's routers; a row sums over layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from runtime.memory.slot import Slot, State


@dataclass(frozen=True, kw_only=True)
class SetResidency:
    """What is known of one expert set, or of one task's routers.

    Args:
        task: which trained it.
        digest: of the set; routers have "digest@generation/task".
        units: layer -> state, of all that are not absent; routers are at layer -1.
        bytes: in memory now.
        references: reservations that hold a part of it, the largest number over its layers; a pin is one.
        pinned: held by a pin.
        error: reason of its quarantine, or None.
    """

    task: str
    digest: str
    units: dict[int, State]
    bytes: int
    references: int
    pinned: bool
    error: str | None


def residency_of(slots: Iterable[Slot], pinned: frozenset[tuple[str, int]]) -> tuple[SetResidency, ...]:
    """Rows by task and digest.

    Args:
        slots: all that there are.
        pinned: keys that pins hold.
    """
    groups: dict[str, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(slot.wanted.key[0], []).append(slot)
    rows = [
        SetResidency(
            task=group[0].wanted.task,
            digest=digest,
            units={slot.wanted.key[1]: slot.state for slot in sorted(group, key=lambda slot: slot.wanted.key)},
            bytes=sum(slot.num_bytes for slot in group if slot.resident),
            references=max(slot.references for slot in group),
            pinned=any(slot.wanted.key in pinned for slot in group),
            error=next((slot.error.reason for slot in group if slot.error is not None), None),
        )
        for digest, group in groups.items()
    ]
    return tuple(sorted(rows, key=lambda row: (row.task, row.digest)))
