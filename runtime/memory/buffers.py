"""Buffers: host memory for units, taken from arenas and used again once nobody can see what lay in it.

It knows nothing of experts or budgets; who takes a buffer decides how many bytes may be resident.
Read first: a buffer is a memoryview. Its room is free when the view and all that was made of it (slices, tensors) are
gone, which Python notices and `take` learns of; nobody gives anything back by hand, so nothing that is still looked at
is ever written over. Memory that is used again has its pages already, which saves much of the time of a load.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate

ALIGNMENT = 64  # bytes: a line of the cache, and a vector
_ARENA_BYTES = 4 << 20
_Watch = weakref.ref[memoryview]


class _Arena:
    """Memory with gaps, ascending (begin, end), no two of which touch."""

    def __init__(self, num_bytes: int) -> None:
        self.size = num_bytes
        # In small pages: steps are no faster on huge ones, and a load would wait until all of a new one is zeroed.
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            with suppress(OSError):  # a kernel without huge ones refuses
                pages.madvise(mmap.MADV_NOHUGEPAGE)
        self.memory = memoryview(pages)
        self.gaps = [(0, num_bytes)]
        self.largest = num_bytes

    @property
    def empty(self) -> bool:
        return self.largest == self.size

    def take(self, num_bytes: int) -> int | None:
        """Where so many bytes begin that are nobody else's now; None where no gap is so large."""
        if num_bytes > self.largest:
            return None
        place = next(place for place, (begin, end) in enumerate(self.gaps) if end - begin >= num_bytes)
        begin, end = self.gaps.pop(place)
        if end - begin > num_bytes:
            self.gaps.insert(place, (begin + num_bytes, end))
        self._measure()
        return begin

    def give_back(self, pieces: Sequence[tuple[int, int]]) -> None:
        """These bytes, (begin, end) each, are gaps again."""
        gaps: list[tuple[int, int]] = []
        for begin, end in sorted([*self.gaps, *pieces]):
            if gaps and gaps[-1][1] == begin:
                gaps[-1] = (gaps[-1][0], end)
            else:
                gaps.append((begin, end))
        self.gaps = gaps
        self._measure()

    def _measure(self) -> None:
        self.largest = max((end - begin for begin, end in self.gaps), default=0)


class Buffers:
    """Safe to share between threads.

    Args:
        idle_arenas: so many arenas with nothing in them are kept for later; others go back to the system.
        arena_bytes: of one, except where a single buffer is larger.
    """

    def __init__(self, *, idle_arenas: int = 2, arena_bytes: int = _ARENA_BYTES) -> None:
        self._idle_arenas = idle_arenas
        self._arena_bytes = arena_bytes
        self._lock = threading.Lock()
        self._arenas: list[_Arena] = []
        self._lent: dict[int, tuple[_Watch, _Arena, int, int]] = {}  # by the identity of the watch
        self._returned: deque[_Watch] = deque()  # filled wherever a view dies, under whatever lock: it takes none

    def take(self, sizes: Sequence[int]) -> list[memoryview]:
        """Buffers of so many bytes each, aligned, with anything in them; one after the other where there is room."""
        rounded = [-(-max(1, size) // ALIGNMENT) * ALIGNMENT for size in sizes]
        with self._lock:
            self._sweep()
            together = self._find(sum(rounded))
            if together is None:
                pairs = zip(sizes, rounded, strict=True)
                return [self._lend(*(self._find(taken) or self._find_new(taken)), size, taken) for size, taken in pairs]
            arena, begin = together
            begins = accumulate(rounded[:-1], initial=begin)
            return [self._lend(arena, *place) for place in zip(begins, sizes, rounded, strict=True)]

    @property
    def held_bytes(self) -> int:
        """Of all arenas, used or not, without those that can go."""
        with self._lock:
            self._sweep()
            return sum(arena.size for arena in self._arenas)

    def check_integrity(self) -> None:
        """Assert that every byte of every arena is lent once or is in a gap."""
        with self._lock:
            self._sweep()
            for arena in self._arenas:
                lent = [(begin, end) for _, whose, begin, end in self._lent.values() if whose is arena]
                ends = sorted([*lent, *arena.gaps])
                assert [begin for begin, _ in ends] == [0, *(end for _, end in ends[:-1])], (
                    "bytes are lost or lent twice"
                )
                assert ends[-1][1] == arena.size, "an arena's end is lost"

    def _find(self, num_bytes: int) -> tuple[_Arena, int] | None:
        for arena in self._arenas:
            begin = arena.take(num_bytes)
            if begin is not None:
                return arena, begin
        return None

    def _find_new(self, num_bytes: int) -> tuple[_Arena, int]:
        arena = _Arena(max(num_bytes, self._arena_bytes))
        self._arenas.append(arena)
        begin = arena.take(num_bytes)
        assert begin is not None, "a new arena has room"
        return arena, begin

    def _lend(self, arena: _Arena, begin: int, num_bytes: int, taken: int) -> memoryview:
        view = arena.memory[begin : begin + num_bytes]
        watch = weakref.ref(view, self._returned.append)
        self._lent[id(watch)] = (watch, arena, begin, begin + taken)
        return view

    def _sweep(self) -> None:
        """Make gaps of what has been given up since the last time; let idle arenas go."""
        if not self._returned:
            return
        back: dict[_Arena, list[tuple[int, int]]] = {}
        while self._returned:
            _, arena, begin, end = self._lent.pop(id(self._returned.popleft()))
            back.setdefault(arena, []).append((begin, end))
        for arena, pieces in back.items():
            arena.give_back(pieces)
        idle = [arena for arena in self._arenas if arena.empty]
        for arena in idle[self._idle_arenas :]:
            self._arenas.remove(arena)
