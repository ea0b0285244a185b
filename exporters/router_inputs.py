"""The router slots of `onnx-model` in one layer: the columns and groups of all mixtures of a batch, side by side.

It does not know experts' weights, nor files.
Read first: a column is one expert as one mixture sees it; a sequence uses the columns and groups of its own mixture.
Temperatures are divided into the weights, as in `runtime.engine.staged_router`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from runtime.model.mixture import Mixture


def pack_routers(
    layer: int, sequences: Sequence[str | None], mixtures: Mapping[str, Mixture], width: int
) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The routers of a layer.

    Args:
        layer: its number.
        sequences: digest of the mixture of each of the B sequences, None for the plain base.
        mixtures: by digest.
        width: D.

    Returns:
        the expert that each column scores, C of them, and the inputs by name without the dimension of layers; where
        there is no column or no group, one that no sequence uses.
    """
    experts: list[str] = []
    owner: list[str] = []
    group_owner: list[str] = []
    parts: dict[str, list[torch.Tensor]] = {"router": [], "bias": [], "group_router": [], "group_bias": []}
    chosen, absolute, opened = [], [], []
    constants: list[float] = []
    members: list[tuple[int, int]] = []
    for digest, mixture in mixtures.items():
        router = mixture.routers.get(layer)
        if router is None:
            continue
        begin, count, groups = len(experts), len(router.experts), router.groups
        tau = groups.tau_expert if groups else 1.0
        parts["router"].append(router.weight.float() / tau)
        parts["bias"].append(torch.zeros(count) if router.bias is None else router.bias / tau)
        chosen += [mixture.kind in ("top_k", "arrow")] * count
        absolute += [mixture.kind == "arrow"] * count
        constants += [0.0] * count if router.constant is None else router.constant.tolist()
        if groups is not None:
            first = len(group_owner)
            pairs = enumerate(groups.member.tolist())
            members += [(first + group, begin + column) for column, group in pairs if group >= 0]
            parts["group_router"].append(groups.weight / groups.tau_group)
            parts["group_bias"].append(groups.bias / groups.tau_group)
            opened += groups.allowed.tolist()
            group_owner += [digest] * len(groups.names)
        experts += router.experts
        owner += [digest] * count
    no_column, no_group = int(not owner), int(not group_owner)
    own = torch.tensor([[digest == sequence for digest in owner] or [False] for sequence in sequences])
    own_groups = torch.tensor([[digest == sequence for digest in group_owner] or [False] for sequence in sequences])
    is_member = torch.zeros(len(group_owner) + no_group, len(owner) + no_column, dtype=torch.bool)
    for group, column in members:
        is_member[group, column] = opened[group]
    return experts, {
        "router": torch.cat([*parts["router"], torch.zeros(no_column, width)]),
        "router_bias": torch.cat([*parts["bias"], torch.zeros(no_column)]),
        "allowed": own & torch.tensor(chosen or [False]),
        "absolute": torch.tensor(absolute or [False]),
        "constant": own * torch.tensor(constants or [0.0]),
        "group_router": torch.cat([*parts["group_router"], torch.zeros(no_group, width)]),
        "group_bias": torch.cat([*parts["group_bias"], torch.zeros(no_group)]),
        "open_groups": own_groups & torch.tensor(opened or [False]),
        "members": is_member,
    }
