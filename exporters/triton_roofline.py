"""Roofline estimates of the mixture kernels: how fast a card could run them at best, from its datasheet.

It knows nothing of how the kernels are written; launching, latency and caches are not in the estimate.
Read first: `max(bytes / bandwidth, operations / peak)`. Every byte is counted once, as if caches were perfect, so the
estimate is a floor and no forecast.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from runtime.kernels.triton_mixture import Variant

_INDEX_BYTES = 8  # id and router weight of a pair


@dataclass(frozen=True)
class Card:
    """A card's datasheet: memory bandwidth in GB/s, dense bfloat16 tensor throughput in TFLOP/s."""

    name: str
    bandwidth: float
    peak: float


CARDS = MappingProxyType(
    {
        "sm_80": Card("A100 80GB SXM", 2039, 312),
        "sm_90": Card("H100 SXM", 3350, 989),
        "sm_100": Card("B200", 8000, 2250),
    }
)
"""By architecture."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """T tokens with K experts each, E different experts among them."""

    num_tokens: int
    num_columns: int = 2
    num_experts: int = 8


DECODE = Workload(num_tokens=8)
"""Eight sequences, one token each."""

PREFILL = Workload(num_tokens=512)
"""A chunk of prompts."""


@dataclass(frozen=True)
class Estimate:
    """What a kernel must move and compute, and the least time in microseconds that a card takes for it."""

    num_bytes: int
    num_operations: int
    least_us: float


def estimate(variant: Variant, rank: int, card: Card, load: Workload | None = None) -> Estimate:
    """Estimate one launch.

    A shrink reads the experts' A and x and writes the float32 intermediate; an expand reads B and the intermediate and
    reads and writes y. Both read ids and weights, and take `2 * P * R * width` operations.

    Args:
        variant: the kernel; its `WIDTH` is D of a shrink and H of an expand.
        rank: of every expert.
        card: the datasheet.
        load: default: `DECODE` for a decode kernel, `PREFILL` for a grouped one.
    """
    if load is None:
        load = DECODE if variant.kernel.startswith("decode") else PREFILL
    width, num_pairs = int(variant.constants["WIDTH"]), load.num_tokens * load.num_columns
    passes = 2 if variant.kernel.endswith("expand") else 1
    stored = (min(load.num_experts, num_pairs) * rank + passes * load.num_tokens) * width * variant.dtype.itemsize
    num_bytes = stored + num_pairs * (rank * 4 + _INDEX_BYTES)
    num_operations = 2 * num_pairs * rank * width
    least_us = max(num_bytes / (card.bandwidth * 1e3), num_operations / (card.peak * 1e6))
    return Estimate(num_bytes, num_operations, least_us)
