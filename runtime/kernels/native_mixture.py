"""Mixtures as the native step reads them: how each layer's columns are weighed, and the experts where they lie.

It knows nothing of tasks or requests; `runtime/kernels/native/mixture.h` reads what is laid out here.
Read first: whoever lays something out keeps the tensors that it points to alive as long as it is used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch

TARGET_ORDER = ("q", "k", "v", "o", "gate", "up", "down")
_NUM_ATTENTION = 4  # of them, the first
MAX_K = 64
"""Experts of one token in one layer at most."""
Weighing = Literal["top_k", "arrow", "grouped", "fixed"]
_WEIGHINGS: tuple[Weighing, ...] = ("top_k", "arrow", "grouped", "fixed")


class _Update(ctypes.Structure):
    _fields_ = (("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("rank", ctypes.c_int64))


class _Column(ctypes.Structure):
    _fields_ = (("updates", _Update * len(TARGET_ORDER)), ("scale", ctypes.c_double), ("halves", ctypes.c_int64))


class _Part(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("weighing", "begin", "end", "top_k")),
        ("share", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "constant")),
        ("groups", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("group_weight", "group_bias", "group_allowed", "member")),
        *((name, ctypes.c_double) for name in ("group_share", "epsilon")),
    )


class _MixtureLayer(ctypes.Structure):
    _fields_ = (
        ("parts", ctypes.POINTER(_Part)),
        ("num_parts", ctypes.c_int64),
        ("columns", ctypes.POINTER(_Column)),
        ("count", ctypes.c_int64),
        ("all", ctypes.c_int64),
    )


class _Mixture(ctypes.Structure):
    _fields_ = (("layers", ctypes.POINTER(_MixtureLayer)),)


class _Stage(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.POINTER(_Mixture)),
        *((name, ctypes.c_int64) for name in ("max_rank", "max_k", "attention")),
    )


class NativeColumn:
    """One expert, wherever it stands under a router's columns.

    Args:
        updates: (target, address of A [R, D], address of B^T [R, H], R) of each; both contiguous, in one dtype.
        scale: of `B A x`.
        dtype: float32 or bfloat16.
        kept: holds that memory.
    """

    def __init__(
        self, updates: Iterable[tuple[str, int, int, int]], scale: float, *, dtype: torch.dtype, kept: object
    ) -> None:
        self._kept = kept
        self.max_rank, self.attention = 0, False
        self.raw = _Column()
        self.raw.scale, self.raw.halves = scale, int(dtype == torch.bfloat16)
        for target, a, b, rank in updates:
            place = TARGET_ORDER.index(target)
            self.raw.updates[place] = _Update(a, b, rank)
            self.max_rank = max(self.max_rank, rank)
            self.attention = self.attention or place < _NUM_ATTENTION

    @classmethod
    def of_tensors(cls, updates: Mapping[str, tuple[torch.Tensor, torch.Tensor]], scale: float) -> Self:
        """The same of (A, B^T), contiguous, all float32 or all bfloat16."""
        (dtype,) = {tensor.dtype for pair in updates.values() for tensor in pair}
        lies = ((target, address(a), address(b), a.shape[0]) for target, (a, b) in updates.items())
        return cls(lies, scale, dtype=dtype, kept=updates)


@dataclass(frozen=True)
class NativeGroups:
    """The groups that a part weighs first; `runtime.kernels.grouping` tells the arithmetic.

    Args:
        weight: [G, D], divided by the temperature, as is the bias.
        bias: [G].
        allowed: [G] bool.
        member: [E] int64, -1 for a column in no group.
        share: what the groups' weights are multiplied by.
        epsilon: below it a group's weight is 0.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    allowed: torch.Tensor
    member: torch.Tensor
    share: float
    epsilon: float


@dataclass(frozen=True)
class NativePart:
    """How the next E columns of a layer are weighed.

    Args:
        weighing: `fixed` takes `constant` alone; see `runtime.model.mixture.weigh`.
        top_k: of those that keep the K largest.
        weight: [E, D].
        bias: [E], None for zeros.
        constant: [E], added to the weights; None for zeros.
        groups: of grouped ones.
        share: what all weights are multiplied by.
    """

    weighing: Weighing
    top_k: int
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    constant: torch.Tensor | None = None
    groups: NativeGroups | None = None
    share: float = 1.0

    @property
    def most(self) -> int:
        """Experts of one token at most."""
        count = self.weight.shape[0]
        return min(self.top_k, count) if self.weighing in ("top_k", "arrow") else count


class NativeMixture:
    """A mixture as the native step reads it: pointers to experts where they lie in memory.

    Args:
        num_layers: L.

    It keeps the tensors that it points to.
    """

    def __init__(self, num_layers: int) -> None:
        self._layers = (_MixtureLayer * num_layers)()
        self._kept: dict[int, object] = {}
        self.max_rank, self.max_k, self.attention = 1, 1, False
        self.raw = _Mixture(self._layers)

    def __contains__(self, layer: int) -> bool:
        return layer in self._kept

    def set_layer(self, layer: int, parts: Sequence[NativePart], columns: Sequence[NativeColumn]) -> None:
        """Give a layer its experts: C columns, and the parts that weigh them, one after the other."""
        array = (_Column * len(columns))(*(column.raw for column in columns))
        self.max_rank = max([self.max_rank, *(column.max_rank for column in columns)])
        self.attention = self.attention or any(column.attention for column in columns)
        kept: list[torch.Tensor] = []
        laid = (_Part * len(parts))()
        begin = 0
        for at, part in enumerate(parts):
            laid[at] = _lay_out(part, begin, kept)
            begin += part.weight.shape[0]
        assert begin == len(columns), "parts weigh all columns"
        most = sum(part.most for part in parts)
        assert most <= MAX_K, "a token has only so many experts"
        self.max_k = max(self.max_k, most)
        every = all(part.weighing in ("top_k", "arrow") and part.most == part.weight.shape[0] for part in parts)
        self._layers[layer] = _MixtureLayer(laid, len(parts), array, len(columns), int(every))
        self._kept[layer] = (parts, columns, array, laid, kept)


class NativeStage:
    """The mixtures of a step.

    Args:
        rows: None is the plain base model.
    """

    def __init__(self, rows: Sequence[NativeMixture | None]) -> None:
        self._rows = (_Mixture * len(rows))(*(row.raw if row else _Mixture() for row in rows))
        self._kept = tuple(rows)
        mixtures = [row for row in rows if row]
        max_rank = max((row.max_rank for row in mixtures), default=1)
        max_k = max((row.max_k for row in mixtures), default=1)
        self.raw = _Stage(self._rows, max_rank, max_k, int(any(row.attention for row in mixtures)))


def address(tensor: torch.Tensor) -> int:
    """Where a contiguous tensor lies."""
    assert tensor.is_contiguous(), "tensors cross as plain memory"
    return tensor.data_ptr()


def _lay_out(part: NativePart, begin: int, kept: list[torch.Tensor]) -> _Part:
    def keep(tensor: torch.Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
        if tensor is None:
            return None
        kept.append(tensor.to(dtype).contiguous())
        return address(kept[-1])

    laid = _Part(_WEIGHINGS.index(part.weighing), begin, begin + part.weight.shape[0], part.top_k, part.share)
    laid.weight, laid.bias, laid.constant = keep(part.weight), keep(part.bias), keep(part.constant)
    if part.groups is not None:
        groups = part.groups
        laid.groups, laid.group_share, laid.epsilon = len(groups.bias), groups.share, groups.epsilon
        laid.group_weight, laid.group_bias = keep(groups.weight), keep(groups.bias)
        laid.group_allowed, laid.member = keep(groups.allowed, torch.int32), keep(groups.member, torch.int32)
    return laid
