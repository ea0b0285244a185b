"""What can be wanted in memory: one (layer, expert) of a task's visible set, or the task's routers.

It knows nothing of tiers; it only says how large a thing is and how it is read.
Read first: routers are wanted like an expert of layer -1, so they are read first, counted in the same budget, and
quarantined in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime.errors import GreenroomError, RepertoireError
from runtime.memory.keys import UnitKey
from runtime.model.expert import Expert
from runtime.model.mixture import Mixture

Held = Expert | Mixture


@dataclass(frozen=True)
class Wanted:
    """One thing that memory can hold.

    Args:
        key: its identity; equal keys are one thing.
        task: which trained it.
        num_bytes: of its tensors.
        rows: (rank, width) of each matrix that a device tier must find room for; none for what stays on the host.
        read: reads, checks and parses it; called on a loader thread, and raises `GreenroomError` where it is bad.
        fetch: brings the bytes of several layers of the same set nearer in one read, so that `read` of each finds them;
            each must be read afterwards. None where there is nothing to gain.
    """

    key: UnitKey
    task: str
    num_bytes: int
    rows: tuple[tuple[int, int], ...]
    read: Callable[[], Held]
    fetch: Callable[[Sequence[int]], None] | None = None

    def attempt(self) -> tuple[Held | None, GreenroomError | None]:
        """What `read` gives, or why it cannot be had."""
        try:
            return self.read(), None
        except GreenroomError as error:
            return None, error
        except (OSError, MemoryError) as error:
            digest, layer = self.key
            return None, RepertoireError(
                f"expert set {digest}: layer {layer} of task {self.task} cannot be read: {error}"
            )


@dataclass(frozen=True)
class VisibleSet:
    """All that a sequence of one task can touch.

    Args:
        task: its name.
        routers: key of the task's routers; None where they are not wanted.
        wanted: the routers, then the experts in the order in which they should be read.
    """

    task: str
    routers: UnitKey | None
    wanted: Sequence[Wanted]
