"""Which attention runs in training.

It does not know what is trained.
Read first: on a CPU the backward pass of the fused attention is slower than the plain one's at the length of our
examples, so it is exchanged, and put back afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from runtime.model.base import BaseModel


@contextmanager
def quick_attention(base: BaseModel) -> Iterator[None]:
    """Plain attention inside where `base` lies on a CPU; the one that it had afterwards."""
    before = base.model.config._attn_implementation  # noqa: SLF001 - transformers has no public reader
    if base.model.device.type == "cpu":
        base.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.model.set_attn_implementation(before)
