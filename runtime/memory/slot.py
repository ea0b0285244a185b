"""A slot: what the memory knows of one thing that is resident, on its way, quarantined or about to go.

It knows nothing of other slots.
Read first: a thing without a slot is ABSENT. The memory changes slots under its lock.
"""

from __future__ import annotations

from enum import Enum

from runtime.errors import GreenroomError
from runtime.memory.reservation import Prefetch, Reservation
from runtime.memory.wanted import Held, Wanted


class State(Enum):
    """Where a thing stands."""

    ABSENT = "absent"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"  # quarantined: its requests fail without asking the disk
    RETIRED = "retired"  # no generation names it any more; it goes when the last reservation is released


class Slot:
    """State of one thing.

    Attributes:
        references: reservations that hold it, and one while it is being placed.
        guesses: open guesses that name it.
        guessed: it was read because of a guess, and nobody has asked for it yet.
        foreseen: an open guess names it and nobody holds it; its bytes count as guessed.
        owner: the tenant whose floor it counts for.
        failures: how often in a row it could not be read.
        retry_at: until then it is quarantined.
        value: in host memory.
        placed: the same in the tier that kernels read; None while it is not there.
        busy: it is being placed.
        waiting: reservations that want it and do not have it yet.
    """

    def __init__(self, wanted: Wanted, *, guessed: bool, owner: str, failures: int) -> None:
        self.wanted = wanted
        self.state = State.LOADING
        self.references = 0
        self.guesses: set[Prefetch] = set()
        self.guessed = guessed
        self.foreseen = False
        self.owner = owner
        self.failures = failures
        self.value: Held | None = None
        self.placed: Held | None = None
        self.busy = False
        self.error: GreenroomError | None = None
        self.retry_at = 0.0
        self.load_s = 0.0
        self.waiting: list[Reservation] = []

    @property
    def num_bytes(self) -> int:
        """Of its tensors."""
        return self.wanted.num_bytes

    @property
    def resident(self) -> bool:
        """Its bytes are in memory."""
        return self.value is not None

    @property
    def idle(self) -> bool:
        """It is in memory and nobody holds it."""
        return self.value is not None and not self.references
