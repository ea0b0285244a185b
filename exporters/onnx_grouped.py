"""The graph of a task's grouped routers, all layers in one: weights of groups, and weights within each group.

It does not know files or verification (`exporters.onnx_router`), nor the experts.
Read first: slot 0 is a layer without any expert; there no group is open and nothing is constant, so all weights are 0.
The formula is that of `runtime.kernels.grouping`; temperatures are divided into the constants.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from exporters.verify import TOLERANCE
from runtime.model.mixture import LayerGroups, Mixture, Router

START = """
router (float[T, {width}] x, int64 layer) => (float[T, {num_experts}] weights) {{
    here = Equal(layers, layer)
    zero = Constant<value_int = 0>()
    slot_or_zero = Where(here, slots, zero)
    slot = ReduceMax<keepdims = 0>(slot_or_zero)
"""
"""How the graph of a task's routers begins, whatever their kind: `slot` is that of the layer, 0 where it has none."""

GRAPH = """
    never = Constant<value_float = -1e30>()
    nothing = Constant<value_float = 0.0>()
    epsilon = Constant<value_float = {epsilon}>()
    share = Constant<value_float = {share}>()
    last = Constant<value_ints = [-1]>()
    second = Constant<value_ints = [1]>()
    group_weight = Gather<axis = 0>(group_weights, slot)
    group_bias = Gather<axis = 0>(group_biases, slot)
    is_open = Gather<axis = 0>(open_groups, slot)
    group_products = MatMul(x, group_weight)
    group_logits = Add(group_products, group_bias)
    open_logits = Where(is_open, group_logits, never)
    group_softmax = Softmax<axis = 1>(open_logits)
    is_large = GreaterOrEqual(group_softmax, epsilon)
    is_used = And(is_open, is_large)
    groups = Where(is_used, group_softmax, nothing)
    router_weight = Gather<axis = 0>(router_weights, slot)
    router_bias = Gather<axis = 0>(router_biases, slot)
    products = MatMul(x, router_weight)
    logits = Add(products, router_bias)
    member = Gather<axis = 0>(members, slot)
    logit_rows = Unsqueeze(logits, second)
    member_logits = Where(member, logit_rows, never)
    member_softmax = Softmax<axis = 2>(member_logits)
    within = Where(member, member_softmax, nothing)
    group_columns = Unsqueeze(groups, last)
    terms = Mul(group_columns, within)
    mixed = ReduceSum<keepdims = 0>(terms, second)
    shared = Mul(mixed, share)
    constant = Gather<axis = 0>(constants, slot)
    weights = Add(shared, constant)
}}
"""


def grouped_graph(mixture: Mixture, width: int, num_experts: int) -> str:
    """The graph in ONNX's textual syntax; `num_experts` are the columns, the general expert's the last."""
    groups = _groups(next(iter(mixture.routers.values())))
    return (START + GRAPH).format(
        width=width, num_experts=num_experts, epsilon=f"{groups.epsilon:.9e}", share=f"{groups.share:.9e}"
    )


def grouped_tensors(mixture: Mixture, columns: Mapping[int, list[int]], num_experts: int) -> dict[str, torch.Tensor]:
    """The graph's constants by name.

    Args:
        mixture: of kind grouped.
        columns: layer -> for each of its router's columns the graph's column.
        num_experts: columns of the graph.
    """
    first = next(iter(mixture.routers.values()))
    num_slots, num_groups, width = len(mixture.routers) + 1, len(_groups(first).names), first.weight.shape[1]
    tensors = {
        "layers": torch.tensor(list(mixture.routers)),
        "slots": torch.arange(1, num_slots),
        "group_weights": torch.zeros(num_slots, width, num_groups),
        "group_biases": torch.zeros(num_slots, num_groups),
        "open_groups": torch.zeros(num_slots, num_groups, dtype=torch.bool),
        "router_weights": torch.zeros(num_slots, width, num_experts),
        "router_biases": torch.zeros(num_slots, num_experts),
        "members": torch.zeros(num_slots, num_groups, num_experts, dtype=torch.bool),
        "constants": torch.zeros(num_slots, num_experts),
    }
    for slot, (layer, router) in enumerate(mixture.routers.items(), start=1):
        groups, here = _groups(router), columns[layer]
        tensors["group_weights"][slot] = groups.weight.t() / groups.tau_group
        tensors["group_biases"][slot] = groups.bias / groups.tau_group
        tensors["open_groups"][slot] = groups.allowed
        tensors["router_weights"][slot, :, here] = router.weight.t() / groups.tau_expert
        if router.bias is not None:
            tensors["router_biases"][slot, here] = router.bias / groups.tau_expert
        if router.constant is not None:
            tensors["constants"][slot, here] = router.constant
        for column, group in zip(here, groups.member.tolist(), strict=True):
            if group >= 0:
                tensors["members"][slot, group, column] = groups.allowed[group]
    return tensors


def grouped_settled(router: Router, x: torch.Tensor) -> torch.Tensor:
    """[T] bool: whether no group of a token is as near to epsilon as rounding could carry it."""
    groups = _groups(router)
    if groups.epsilon == 0:
        return torch.ones(len(x), dtype=torch.bool)
    logits = (x @ groups.weight.t() + groups.bias) / groups.tau_group
    shares = torch.softmax(logits.masked_fill(~groups.allowed, -torch.inf), dim=1)
    rounding = TOLERANCE * logits.abs().max(1, keepdim=True).values.clamp(min=1)
    return ((shares - groups.epsilon).abs() > rounding).all(1)


def grouped_scale(router: Router, x: torch.Tensor) -> torch.Tensor:
    """[T, 1]: the largest logit of a token; the rounding of its weights grows with it."""
    groups = _groups(router)
    of_groups = (x @ groups.weight.t() + groups.bias) / groups.tau_group
    of_experts = x @ router.weight.t() / groups.tau_expert
    if router.bias is not None:
        of_experts = of_experts + router.bias / groups.tau_expert
    return torch.cat((of_groups, of_experts), dim=1).abs().max(1, keepdim=True).values


def _groups(router: Router) -> LayerGroups:
    assert router.groups is not None, "a grouped mixture has groups in every layer"
    return router.groups
