"""A blend: one mixture of several tasks, each with a share of the weight.

It knows nothing of requests or engines; it gets the tasks' mixtures and gives another one, with an identity of its own.
Read first: `w = sum_t lambda_t * w_t` in every layer, for the FFN and the attention alike: each task's router chooses
among its own visible set as if it were alone. A layer that only some tasks have experts in gets only their shares.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runtime.errors import InvalidInputError
from runtime.model.mixture import Mixture, Router, RouterPart, fields_digest


def blended(parts: Sequence[tuple[float, Mixture]]) -> Mixture:
    """The mixture that adds up those of several tasks (ours).

    Args:
        parts: shares lambda_t > 0, which sum to 1, with the mixtures; a single one is returned as it is.

    Raises:
        InvalidInputError: a mixture with hyper-adapters, which answer to the choice of their own router alone.
    """
    if len(parts) == 1:
        return parts[0][1]
    for _, mixture in parts:
        assert not mixture.by_request, "weights of whole prompts are fixed before they are blended"
        if mixture.hyper is not None:
            raise InvalidInputError("task_weights", mixture.task, "has hyper-adapters and cannot be blended")
    layers = sorted({layer for _, mixture in parts for layer in mixture.routers})
    tasks = tuple(mixture.task for _, mixture in parts)
    identity = [field for share, mixture in parts for field in (float(share).hex(), mixture.digest)]
    return Mixture(
        task=" + ".join(tasks),
        digest=fields_digest("blend", *identity),
        top_k=sum(mixture.top_k for _, mixture in parts),
        routers={layer: _side_by_side(layer, parts) for layer in layers},
        kind="blend",
        variant=" ".join(f"{share:g}" for share, _ in parts),
        blended=tasks,
    )


def _side_by_side(layer: int, parts: Sequence[tuple[float, Mixture]]) -> Router:
    own = [
        RouterPart(share, mixture.kind, mixture.top_k, mixture.routers[layer])
        for share, mixture in parts
        if layer in mixture.routers
    ]
    routers = [part.router for part in own]
    return Router(
        weight=torch.cat([router.weight for router in routers]),
        experts=tuple(digest for router in routers for digest in router.experts),
        labels=tuple(label for router in routers for label in router.labels or ("",) * len(router.experts)),
        parts=tuple(own),
    )
