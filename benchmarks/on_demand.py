"""Reading on demand, to compare with: a layer's experts are read when a prompt stands before that layer, not earlier.

It knows nothing of requests. Of the real loader it takes the threads and the queue, and holds back what it is given.
Read first: this is how experts come in where nothing is foreseen, neither from a guess nor from the located task.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from runtime.memory.keys import ROUTERS, UnitKey
from runtime.memory.loader import Loader, Priority


class OnDemand(Loader[UnitKey]):
    """See the module; routers are read at once, since without them no prompt can stand before a layer.

    Args:
        work: as `Loader`, as for the others.
        num_threads: likewise.
        name: likewise.
    """

    def __init__(self, work: Callable[[UnitKey], None], *, num_threads: int, name: str) -> None:
        self._back: set[UnitKey] = set()
        self._guard = threading.Lock()
        super().__init__(work, num_threads=num_threads, name=name)

    def submit(self, keys: Sequence[UnitKey], *, priority: Priority) -> None:
        """Queue the routers, and hold the experts back."""
        with self._guard:
            self._back.update(key for key in keys if key[1] != ROUTERS)
        super().submit([key for key in keys if key[1] == ROUTERS], priority=priority)

    def raise_to(self, keys: Iterable[UnitKey], priority: Priority) -> None:
        """Somebody waits for these: of what is held back, the lowest layer is queued."""
        keys = list(keys)
        super().raise_to(keys, priority)
        with self._guard:
            waiting = self._back.intersection(keys)
            lowest = min((layer for _, layer in waiting), default=None)
            now = sorted(key for key in waiting if key[1] == lowest)
            self._back.difference_update(now)
        super().submit(now, priority=priority)
