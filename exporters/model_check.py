"""Whole models compared by their logits, and stored updates compared with the sum that they stand for.

It knows nothing of formats: a target gives the model, or the products, that it read back from its own files.
Read first: logits show that the update sits in the right place and loads; the products, compared one linear at a time,
show that every weight is right, also one that moves no logit by more than rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import transformers

from exporters.constant_mixture import ConstantMixture, delta
from exporters.manifest import Check
from exporters.options import Source
from exporters.verify import SIZES, Tally, Wanted
from runtime.model.base import BaseModel, load_base
from runtime.model.generation import check_base
from runtime.model.manifest import TARGETS, Target

LOGITS_TOLERANCE = 1e-4
"""Largest error of a float32 logit in units of the row's largest: what rounding adds up to over tens of layers."""

DELTA_TOLERANCE = 1e-5
"""Largest error of a float32 update in units of the largest of its linear."""

Prompts = Sequence[torch.Tensor]
"""Token ids [1, T] each."""


def load_own_base(source: Source) -> BaseModel:
    """Load the base of the generation in float32 on the CPU.

    Raises:
        UnknownBaseError, InvalidInputError: see `load_base`.
        BaseMismatchError: the generation was made for another base.
    """
    base = load_base(source.base_folder(), dtype=torch.float32, device=torch.device("cpu"))
    check_base(source.generation.manifest, base.info)
    return base


def random_prompts(vocab_size: int) -> Prompts:
    """Seeded token ids, one prompt of every length in `SIZES`."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (1, size), generator=generator) for size in SIZES]


@torch.no_grad()
def logits(model: transformers.PreTrainedModel, prompts: Prompts) -> list[torch.Tensor]:
    """[T, V] float32 of every prompt."""
    return [model(ids, use_cache=False).logits[0].float() for ids in prompts]


def check_logits(
    where: str,
    got: Sequence[torch.Tensor],
    wanted: Sequence[torch.Tensor],
    *,
    output: str = "logits",
    tolerance: float = LOGITS_TOLERANCE,
) -> Check:
    """Compare logits of the same prompts, or another `output` with a row per token.

    Raises:
        ExportMismatchError: they differ by more than `tolerance` of the row's largest.
    """
    tally = Tally(output)
    for one, other in zip(got, wanted, strict=True):
        scale = other.abs().max(1, keepdim=True).values
        tally.compare(f"{where}: {output}", one.numpy(), Wanted(other, scale=scale, tolerance=tolerance), len(other))
    return tally.check()


def check_updates(where: str, mixture: ConstantMixture, stored: Callable[[int, Target], torch.Tensor]) -> Check:
    """Compare every stored update with the sum over the experts, in float64.

    Args:
        where: the file, for messages.
        mixture: what was to be stored.
        stored: layer, linear -> the update [out, in] as the file has it, float64.

    Raises:
        ExportMismatchError: one differs, or has another shape.
    """
    tally = Tally("updates")
    for layer, terms in mixture.items():
        for target in TARGETS:
            wanted = delta(terms, target)
            if wanted is not None:
                scale = wanted.abs().max().clamp(min=1e-30)
                unit = Wanted(wanted / scale, scale=torch.ones_like(wanted), tolerance=DELTA_TOLERANCE)
                got = stored(layer, target) / scale
                tally.compare(f"{where}: layer {layer} {target}", got.numpy(), unit, wanted.shape[0])
    return tally.check()
