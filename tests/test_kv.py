"""The KV cache: memory that is there only once it is written."""

from __future__ import annotations

import mmap
import struct
import sys
from pathlib import Path

import pytest
import torch

from runtime.engine.kv import KVCache, KVShape

SHAPE = KVShape(num_layers=8, num_heads=2, head_width=64, context=8192)


def resident_bytes(tensor: torch.Tensor) -> int:
    """Of the pages that a tensor lies in, those that have memory; the top bit of their words in `pagemap`."""
    page = mmap.PAGESIZE
    first, end = tensor.data_ptr() // page, -(-(tensor.data_ptr() + tensor.nbytes) // page)
    with Path("/proc/self/pagemap").open("rb") as words:
        words.seek(first * 8)
        found = struct.unpack(f"={end - first}Q", words.read((end - first) * 8))
    return sum(word >> 63 for word in found) * page


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux what is resident")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slot_takes_memory_as_tokens_are_written_to_it(dtype: torch.dtype) -> None:
    cache = KVCache(SHAPE, num_slots=16, budget_bytes=1 << 40, dtype=dtype, device=torch.device("cpu"))
    token_bytes = SHAPE.token_bytes(dtype) // 2
    planes = SHAPE.num_layers * SHAPE.num_heads
    for slot in range(4):
        cache.keys[:, slot, :, :3] = 1
    assert resident_bytes(cache.keys) <= 4 * (planes * 4096 + 3 * token_bytes)
    assert cache.keys.nbytes > 100 << 20
    assert float(cache.keys[:, :4, :, :3].float().mean()) == 1
    assert not cache.keys[:, 4:5, :, :1].any()


def test_no_sequence_gets_a_spare_slot() -> None:
    cache = KVCache(SHAPE, num_slots=2, budget_bytes=1 << 40, dtype=torch.float32, device=torch.device("cpu"), spare=1)
    assert [cache.acquire(1), cache.acquire(1), cache.acquire(1)] == [1, 2, None]
    assert cache.keys.shape[1] == cache.values.shape[1] == 3
    cache.check_integrity()
    cache.release(1)
    cache.check_integrity()
