"""The mixture op on the Triton kernels: which kernel runs with which block sizes, grid and arguments.

It knows neither Triton nor CUDA: whoever runs a `Launch` is passed in (`runtime.kernels.triton_launch` on a GPU,
`runtime.kernels.triton_interpreter` on a CPU).
Read first: a compiled kernel is one `Variant`: kernel, dtype and constants. The same functions here say which variants
a call needs and which ones an export compiles, so the two cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from runtime.errors import InvalidInputError
from runtime.kernels.mixture import PackedUpdate
from runtime.kernels.triton_metadata import BLOCK_PAIRS, BLOCK_TOKENS, MixtureMetadata

RANK_BUCKETS = (8, 16, 32, 64)
"""Ranks that share a grouped shrink; a rank above the largest runs in several chunks of it."""

_DECODE_RANKS = 8  # ranks per program of the decode shrink
_EXPAND_RANKS = 16  # ranks per step of an expand: the least that a tensor core takes
_LARGEST_INDEX = 2**31 - 1  # kernels count elements in 32 bits


@dataclass(frozen=True)
class Variant:
    """One kernel to compile.

    Args:
        kernel: function in `runtime.kernels.triton_kernels`.
        dtype: of x, a, b and y.
        constants: what is fixed at compile time.
    """

    kernel: str
    dtype: torch.dtype
    constants: Mapping[str, int | str]

    @property
    def key(self) -> tuple[str, str, tuple[tuple[str, int | str], ...]]:
        """What a compiled kernel is found by."""
        return self.kernel, str(self.dtype).removeprefix("torch."), tuple(sorted(self.constants.items()))


@dataclass(frozen=True)
class Launch:
    """One run of a kernel; `arguments` by the kernel's parameter names."""

    variant: Variant
    grid: tuple[int, int, int]
    arguments: Mapping[str, torch.Tensor | int]


Launcher = Callable[[Launch], None]
_Arguments = dict[str, torch.Tensor | int]


@dataclass(frozen=True)
class ExpertRows:
    """Packed experts of one linear, and where each lies.

    Args:
        update: `a` [S, D] and `b` [S, H], S = sum of ranks.
        ranks: of each of the E experts, in the order of packing; 0 for one that does not change this linear.
        rows: [E + 1] int32, expert e has the rows `rows[e] .. rows[e + 1]`.
    """

    update: PackedUpdate
    ranks: tuple[int, ...]
    rows: torch.Tensor = field(repr=False)


def expert_rows(update: PackedUpdate, ranks: Sequence[int]) -> ExpertRows:
    """Describe packed experts; made once, whenever experts are packed.

    Raises:
        InvalidInputError: the ranks do not add up to the packed rows.
    """
    if sum(ranks) != update.a.shape[0] or min(ranks, default=0) < 0:
        raise InvalidInputError("ranks", tuple(ranks), f"must add up to the {update.a.shape[0]} packed rows")
    ends = torch.tensor([0, *ranks]).cumsum(0)
    return ExpertRows(update, tuple(ranks), ends.to(update.a.device, torch.int32))


def rank_bucket(rank: int) -> int:
    """The smallest bucket that holds a rank, the largest one for ranks beyond all."""
    return next((bucket for bucket in RANK_BUCKETS if rank <= bucket), RANK_BUCKETS[-1])


def grouped_shrink_variant(width: int, bucket: int, dtype: torch.dtype) -> Variant:
    """Shrink of many tokens from `width` inputs, for the ranks of one bucket."""
    block = 32 if dtype is torch.float32 else 64
    span = min(2048, _ceil(width, block) * block)
    constants = {"WIDTH": width, "SPAN": span, "BLOCK_P": BLOCK_PAIRS, "BLOCK_R": bucket, "BLOCK_D": block}
    return Variant("grouped_shrink", dtype, {**constants, "PRECISION": _precision(dtype)})


def grouped_expand_variant(width: int, dtype: torch.dtype) -> Variant:
    """Expand of many tokens to `width` outputs."""
    constants = {"WIDTH": width, "BLOCK_T": BLOCK_TOKENS, "BLOCK_R": _EXPAND_RANKS, "BLOCK_H": 64}
    return Variant("grouped_expand", dtype, {**constants, "PRECISION": _precision(dtype)})


def decode_shrink_variant(width: int, dtype: torch.dtype) -> Variant:
    """Shrink of few tokens from `width` inputs."""
    return Variant("decode_shrink", dtype, {"WIDTH": width, "BLOCK_R": _DECODE_RANKS, "BLOCK_D": 512})


def decode_expand_variant(width: int, dtype: torch.dtype) -> Variant:
    """Expand of few tokens to `width` outputs."""
    return Variant("decode_expand", dtype, {"WIDTH": width, "BLOCK_R": _EXPAND_RANKS, "BLOCK_H": 128})


def add_mixture_triton(
    y: torch.Tensor, x: torch.Tensor, experts: ExpertRows, metadata: MixtureMetadata, launch: Launcher
) -> None:
    """`y[t] += sum_k w[t, k] * B[id[t, k]] A[id[t, k]] x[t]`, in place; the scale is in the packed B.

    The rank-R intermediate is float32, the sum over experts is taken in float32 and added to `y` once. Cost follows
    the pairs and their real ranks, not the experts that are packed.

    Args:
        y: [T, H] of the experts' dtype, changed; rows may be apart, elements of a row may not.
        x: [T, D] likewise.
        experts: E packed experts, all finite: what a token does not use is multiplied by zero where its neighbours do.
        metadata: routing of the T tokens over those E experts.
        launch: runs a kernel.

    Raises:
        InvalidInputError: shapes, dtypes or strides do not fit, or a tensor has 2^31 elements or more.
    """
    _check(y, x, experts, metadata)
    num_pairs = metadata.ids.numel()
    if num_pairs == 0 or not any(experts.ranks):
        return
    make = _decode if metadata.grouped is None else _grouped
    for step in make(y, x, experts, metadata):
        launch(step)


def _decode(y: torch.Tensor, x: torch.Tensor, experts: ExpertRows, metadata: MixtureMetadata) -> Iterator[Launch]:
    (num_tokens, width), out_width, dtype = x.shape, y.shape[1], x.dtype
    variant = decode_shrink_variant(width, dtype)
    num_splits = _ceil(width, int(variant.constants["BLOCK_D"]))
    mid = _intermediate(metadata, num_splits, experts)
    grid = (metadata.ids.numel(), _ceil(max(experts.ranks), _DECODE_RANKS), num_splits)
    shared: _Arguments = {
        "mid": mid,
        "rows": experts.rows,
        "ids": metadata.ids,
        "num_columns": metadata.ids.shape[1],
        "mid_stride": mid.shape[2],
    }
    inputs: _Arguments = {"x": x, "a": experts.update.a, "weights": metadata.weights, "x_stride": x.stride(0)}
    yield Launch(variant, grid, {**shared, **inputs})
    variant = decode_expand_variant(out_width, dtype)
    outputs: _Arguments = {"y": y, "b": experts.update.b, "num_splits": num_splits, "y_stride": y.stride(0)}
    blocks = _ceil(out_width, int(variant.constants["BLOCK_H"]))
    yield Launch(variant, (num_tokens, blocks, 1), {**shared, **outputs})


def _grouped(y: torch.Tensor, x: torch.Tensor, experts: ExpertRows, metadata: MixtureMetadata) -> Iterator[Launch]:
    (num_tokens, width), out_width, dtype = x.shape, y.shape[1], x.dtype
    tables = metadata.grouped
    assert tables is not None, "grouped kernels have tables"
    num_splits = _ceil(width, int(grouped_shrink_variant(width, RANK_BUCKETS[0], dtype).constants["SPAN"]))
    mid = _intermediate(metadata, num_splits, experts)
    shared: _Arguments = {
        "mid": mid,
        "rows": experts.rows,
        "num_columns": metadata.ids.shape[1],
        "mid_stride": mid.shape[2],
    }
    inputs: _Arguments = {
        "x": x,
        "a": experts.update.a,
        "tiles": tables.tiles,
        "order": tables.order,
        "weights": metadata.weights,
        "x_stride": x.stride(0),
    }
    for bucket in sorted({rank_bucket(rank) for rank in experts.ranks if rank}):
        ranks = [rank for rank in experts.ranks if rank and rank_bucket(rank) == bucket]
        bounds: _Arguments = {"above_rank": min(ranks) - 1, "up_to_rank": max(ranks)}
        grid = (tables.tiles.shape[0], _ceil(max(ranks), bucket), num_splits)
        yield Launch(grouped_shrink_variant(width, bucket, dtype), grid, {**shared, **inputs, **bounds})
    variant = grouped_expand_variant(out_width, dtype)
    outputs: _Arguments = {
        "y": y,
        "b": experts.update.b,
        "ids": metadata.ids,
        "token_order": tables.token_order,
        "tile_experts": tables.tile_experts,
        "num_tile_experts": tables.num_tile_experts,
        "num_tokens": num_tokens,
        "num_splits": num_splits,
        "max_tile_experts": tables.tile_experts.shape[1],
        "y_stride": y.stride(0),
    }
    blocks = _ceil(out_width, int(variant.constants["BLOCK_H"]))
    yield Launch(variant, (tables.tile_experts.shape[0], blocks, 1), {**shared, **outputs})


def _intermediate(metadata: MixtureMetadata, num_splits: int, experts: ExpertRows) -> torch.Tensor:
    """[P, splits, R] float32, not initialised: kernels read only what they wrote."""
    shape = (metadata.ids.numel(), num_splits, _ceil(max(experts.ranks), 16) * 16)
    if math.prod(shape) > _LARGEST_INDEX:
        raise InvalidInputError("intermediate", shape, "has 2^31 elements or more; use fewer tokens")
    return torch.empty(shape, dtype=torch.float32, device=metadata.ids.device)


def _check(y: torch.Tensor, x: torch.Tensor, experts: ExpertRows, metadata: MixtureMetadata) -> None:
    update = experts.update
    tokens = {x.shape[0], y.shape[0], metadata.ids.shape[0]}
    if len(tokens) > 1 or (x.shape[1], y.shape[1]) != (update.a.shape[1], update.b.shape[1]):
        shapes = [tuple(tensor.shape) for tensor in (x, y, metadata.ids, update.a, update.b)]
        raise InvalidInputError("shapes", shapes, "of x, y, ids, a and b do not fit each other")
    if len(experts.ranks) != metadata.num_experts:
        raise InvalidInputError("ranks", experts.ranks, f"the routing is over {metadata.num_experts} experts")
    for name, tensor in (("x", x), ("y", y), ("a", update.a), ("b", update.b)):
        if tensor.dtype != x.dtype or tensor.stride(1) != 1 or (name in "ab" and not tensor.is_contiguous()):
            raise InvalidInputError(name, tensor.dtype, f"must be {x.dtype}, elements of a row beside each other")
        if tensor.shape[0] * tensor.stride(0) > _LARGEST_INDEX:
            raise InvalidInputError(name, tuple(tensor.shape), "has 2^31 elements or more")


def _precision(dtype: torch.dtype) -> str:
    """How tensor cores multiply float32: in one tf32 product where the other factor is exact in tf32, else in three."""
    return "tf32x3" if dtype is torch.float32 else "tf32"


def _ceil(value: int, step: int) -> int:
    return -(-value // step)
