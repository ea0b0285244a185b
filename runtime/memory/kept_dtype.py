"""In which dtype experts stay in memory, which is not always the one they are stored in.

It knows nothing of disks or budgets.
Read first: an engine that computes with bfloat16 keeps no more than that of an expert: adapters that others trained
come in float32, and would take twice the memory, and twice the time to read in every step.
"""

from __future__ import annotations

import torch

from runtime.errors import NonFiniteError
from runtime.model.expert import DTYPES, Expert, LowRank
from runtime.model.manifest import ExpertSet, Target, Unit
from runtime.model.side_by_side import Allocate, fresh_memory


def kept_dtype(entry: ExpertSet, dtype: torch.dtype | None) -> torch.dtype:
    """What a set's experts stay in where the engine wants `dtype`: that, or the bfloat16 that they are stored in.

    None wants them as they are stored.
    """
    stored = DTYPES[entry.dtype]
    return stored if dtype is None or stored == torch.bfloat16 else dtype


def kept_bytes(entry: ExpertSet, unit: Unit, dtype: torch.dtype | None) -> int:
    """Bytes of one of its experts in memory."""
    return unit.bytes // DTYPES[entry.dtype].itemsize * kept_dtype(entry, dtype).itemsize


def in_dtype(expert: Expert, dtype: torch.dtype, *, allocate: Allocate = fresh_memory) -> Expert:
    """The expert in one piece of memory from `allocate`, every B as the transpose of a contiguous [R, out].

    Raises:
        NonFiniteError: a weight is too large for `dtype`.
    """
    (memory,) = allocate([expert.num_parameters * dtype.itemsize])
    flat = torch.frombuffer(memory, dtype=dtype)
    updates: dict[Target, LowRank] = {}
    begin = 0
    for target, update in expert.updates.items():
        (rank, wide), narrow = update.a.shape, update.b.shape[0]
        a = flat[begin : begin + rank * wide].view(rank, wide).copy_(update.a)
        begin += a.numel()
        b = flat[begin : begin + rank * narrow].view(rank, narrow).copy_(update.b.t())
        begin += b.numel()
        updates[target] = LowRank(a, b.t())
    if any(bound.isinf() for bound in torch.aminmax(flat)):
        raise NonFiniteError(f"layer {expert.layer} of an expert set holds a weight that is too large for {dtype}")
    return Expert(layer=expert.layer, scale=expert.scale, updates=updates)
