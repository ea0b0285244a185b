"""What a request makes of a mixture: groups shifted or masked, and weights fixed for a whole prompt (AT-MoE).

It knows nothing of requests or engines; it gets a task's mixture and gives another one, with an identity of its own.
Read first: experts that can get no weight any more leave the mixture, so they are neither read nor kept in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from runtime.errors import InvalidInputError
from runtime.model.locator import pool
from runtime.model.mixture import Mixture, Router, fields_digest, weigh


def controlled(mixture: Mixture, bias: Mapping[str, float], mask: Collection[str]) -> Mixture:
    """The mixture with `bias[g]` added to the logit of group g and the groups in `mask` at exactly 0 (AT-MoE, control).

    The bias is added beside the router's own, before the temperature. The groups that stay share all of the weight; a
    layer in which none of them has an expert is the base's own.

    Raises:
        InvalidInputError: an unknown group, every group masked, or a mixture without groups.
    """
    for field, names in (("group_bias", bias), ("group_mask", mask)):
        if names and mixture.kind != "grouped":
            raise InvalidInputError(field, sorted(names), f"task {mixture.task} has no grouped router")
        known = group_names(mixture)
        for name in names:
            if name not in known:
                raise InvalidInputError(field, name, f"the groups of task {mixture.task} are {', '.join(known)}")
    if mask and set(mask) >= set(group_names(mixture)):
        raise InvalidInputError("group_mask", sorted(mask), f"leaves no group of task {mixture.task}")
    shifts = {name: value for name, value in sorted(bias.items()) if value != 0 and name not in mask}
    if not shifts and not mask:
        return mixture
    variant = json.dumps({"bias": shifts, "mask": sorted(mask)}, sort_keys=True)
    routers = {layer: _shifted(router, shifts, mask) for layer, router in mixture.routers.items()}
    return _varied(mixture, routers, variant)


def group_names(mixture: Mixture) -> tuple[str, ...]:
    """Names of the groups of a grouped mixture; empty for other kinds."""
    groups = [router.groups for router in mixture.routers.values() if router.groups is not None]
    return groups[0].names if groups else ()


def summary(residual: torch.Tensor) -> torch.Tensor:
    """What a router of scope `request` reads: `s = f / rms(f)`, f the mean of the residual stream [T, D]; [D] float32.

    The residual stream is that of the whole prompt where it enters the first expert layer (ours; the paper does not say
    what summarises an instruction).
    """
    mean = pool(residual)
    return mean / mean.square().mean().sqrt().clamp(min=1e-6)


def fixed_for(mixture: Mixture, prompt_summary: torch.Tensor) -> Mixture:
    """A mixture of scope `request` with its weights fixed for one prompt; others are returned as they are.

    Args:
        mixture: of a task, or controlled.
        prompt_summary: [D], see `summary`.
    """
    if not mixture.by_request:
        return mixture
    routers: dict[int, Router] = {}
    hasher = hashlib.sha256()
    for layer, router in mixture.routers.items():
        x = prompt_summary.unsqueeze(0).to(router.weight.device)
        weights = weigh(router, x, kind=mixture.kind, top_k=mixture.top_k)[0]
        routers[layer] = _kept(replace(router, constant=weights, groups=None), weights > 0)
        hasher.update(weights.cpu().numpy().tobytes())
    variant = f"{mixture.variant} fixed {hasher.hexdigest()}"
    return replace(_varied(mixture, routers, variant), kind="fixed", by_request=False)


def _varied(mixture: Mixture, routers: Mapping[int, Router], variant: str) -> Mixture:
    used = {layer: router for layer, router in routers.items() if router.experts}
    return replace(mixture, routers=used, variant=variant, digest=fields_digest(mixture.digest, variant))


def _shifted(router: Router, shifts: Mapping[str, float], mask: Collection[str]) -> Router:
    groups = router.groups
    assert groups is not None, "checked by the caller"
    shift = torch.tensor([shifts.get(name, 0.0) for name in groups.names], device=groups.bias.device)
    open_ = torch.tensor([name not in mask for name in groups.names], device=groups.bias.device)
    changed = replace(groups, bias=groups.bias + shift, allowed=groups.allowed & open_)
    keep = torch.tensor([label not in mask for label in router.labels], device=groups.bias.device)
    return _kept(replace(router, groups=changed), keep)


def _kept(router: Router, keep: torch.Tensor) -> Router:
    """Only the columns in `keep` [E] bool."""
    chosen = [column for column, kept in enumerate(keep.tolist()) if kept]
    groups = router.groups
    return Router(
        weight=router.weight[chosen],
        experts=tuple(router.experts[column] for column in chosen),
        bias=None if router.bias is None else router.bias[chosen],
        constant=None if router.constant is None else router.constant[chosen],
        groups=None if groups is None else replace(groups, member=groups.member[chosen]),
        labels=tuple(router.labels[column] for column in chosen),
    )
