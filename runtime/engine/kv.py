"""The KV cache: one growing slot per sequence, reserved in bytes before a sequence starts.

It knows nothing of requests; the scheduler acquires and releases slots, the step writes and reads them.
Read first: the tensors span `slots x context`, but memory is only touched as tokens are written: on a CPU they are
zero pages that the kernel has not yet made. The budget counts tokens that running sequences may come to hold.
"""

from __future__ import annotations

import heapq
import math
import mmap
from contextlib import suppress
from dataclasses import dataclass

import torch

from runtime.errors import BudgetError


@dataclass(frozen=True, kw_only=True)
class KVShape:
    """Sizes of the cache.

    Args:
        num_layers: L.
        num_heads: key/value heads.
        head_width: width of one head.
        context: tokens a slot can hold.
    """

    num_layers: int
    num_heads: int
    head_width: int
    context: int

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of keys and values of one token over all layers."""
        return 2 * self.num_layers * self.num_heads * self.head_width * dtype.itemsize


class KVCache:
    """Keys and values [L, slots, heads, context, width].

    Args:
        shape: see `KVShape`.
        num_slots: sequences at most.
        spare: slots before the others that no sequence gets: where tokens are written that only fill up a step.
        budget_bytes: of tokens that may be held at once.
        dtype: of keys and values.
        device: where they live.

    `reserved_bytes` are those that the sequences in slots may come to hold.
    """

    def __init__(
        self,
        shape: KVShape,
        *,
        num_slots: int,
        budget_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        spare: int = 0,
    ) -> None:
        self.shape = shape
        self.budget_bytes = budget_bytes
        self.num_slots, self.spare = num_slots, spare
        size = (shape.num_layers, spare + num_slots, shape.num_heads, shape.context, shape.head_width)
        self.keys = _zeros(size, dtype, device)
        self.values = _zeros(size, dtype, device)
        self._token_bytes = shape.token_bytes(dtype)
        self._slots = range(spare, spare + num_slots)
        self._free = list(self._slots)
        self._held: dict[int, int] = {}
        self.reserved_bytes = 0

    def check_fits(self, num_tokens: int) -> None:
        """Raise BudgetError if `num_tokens` could not be held even by an empty cache."""
        if num_tokens * self._token_bytes > self.budget_bytes:
            raise BudgetError(
                f"a sequence of {num_tokens} tokens needs {num_tokens * self._token_bytes} bytes of KV cache, "
                f"the budget is {self.budget_bytes}"
            )

    def acquire(self, num_tokens: int) -> int | None:
        """Reserve a slot for `num_tokens`; the lowest free one, or None where slots or bytes are used up now."""
        needed = num_tokens * self._token_bytes
        if not self._free or self.reserved_bytes + needed > self.budget_bytes:
            return None
        slot = heapq.heappop(self._free)
        self._held[slot] = needed
        self.reserved_bytes += needed
        return slot

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Copy keys and values of the first `num_tokens` of one held slot to another."""
        for tensor in (self.keys, self.values):
            tensor[:, target, :, :num_tokens] = tensor[:, source, :, :num_tokens]

    def release(self, slot: int) -> None:
        """Give a slot back."""
        self.reserved_bytes -= self._held.pop(slot)
        heapq.heappush(self._free, slot)

    def check_integrity(self) -> None:
        """Assert that every slot is either free or held, and the budget is kept."""
        assert sorted([*self._free, *self._held]) == list(self._slots), "a slot is lost or held twice"
        assert self.reserved_bytes == sum(self._held.values()), "reserved bytes drifted"
        assert self.reserved_bytes <= self.budget_bytes, "the KV budget is exceeded"


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    # torch.zeros writes every page; these are left to the kernel until they are first written. Huge pages would make
    # whole slots resident for a few tokens.
    count = math.prod(size)
    pages = mmap.mmap(-1, max(1, count) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages refuses
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=count).view(size)
