"""Routers on disk: which tensors a task's router blob holds for each kind, and the mixture they make.

It knows nothing of experts' weights, nor how routers are trained.
Read first: row j of a layer's weight belongs to the j-th visible expert set that has an expert in this layer; rows of
groups come in the order of `Grouping.names`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from runtime.model.hyper import HyperSizes
from runtime.model.hyper_sets import Hyper
from runtime.model.manifest import HyperRef, Manifest, Task
from runtime.model.mixture import LayerGroups, Mixture, Router, fields_digest
from runtime.model.router_record import Grouping

Tensors = Mapping[str, torch.Tensor]


def router_tensor_name(layer: int, part: str = "weight") -> str:
    """Name of a tensor in the router blob; `part` is weight, logits, group.weight or group.bias."""
    return f"layer.{layer:04d}.{part}"


def router_shapes(manifest: Manifest, task: Task) -> dict[str, tuple[int, ...]]:
    """The tensors that a task's router blob must hold."""
    shapes: dict[str, tuple[int, ...]] = {}
    width, grouping = manifest.base.width, task.router.grouping
    for layer, experts in manifest.visible_layers(task).items():
        if grouping is None or grouping.within == "input":
            shapes[router_tensor_name(layer)] = (len(experts), width)
        else:
            shapes[router_tensor_name(layer, "logits")] = (len(experts),)
        if grouping is not None:
            shapes[router_tensor_name(layer, "group.weight")] = (len(grouping.names()), width)
            shapes[router_tensor_name(layer, "group.bias")] = (len(grouping.names()),)
    return shapes


def router_bytes(manifest: Manifest, task: Task) -> int:
    """What a task's routers count for in memory: a row of D float32 per (layer, expert) of its visible set."""
    rows = sum(len(manifest.expert_set(digest).units) for digest in task.router.all_experts())
    return max(1, rows) * manifest.base.width * 4


def hyper_sizes(manifest: Manifest, task: Task, ref: HyperRef) -> HyperSizes:
    """Sizes of a task's hypernetwork: the experts of a layer are those that its router may choose there."""
    experts = {layer: len(digests) for layer, digests in manifest.visible_layers(task).items()}
    return HyperSizes(width=manifest.base.width, bottleneck=ref.bottleneck, factor=ref.factor, experts=experts)


def make_mixture(manifest: Manifest, task: Task, tensors: Tensors, hyper: Tensors | None = None) -> Mixture:
    """The mixture of a task.

    Args:
        manifest: of the generation; enters the identity.
        task: one of its tasks.
        tensors: of the router blob, as in `router_shapes`.
        hyper: of the hyper-adapters, as in `runtime.model.hyper_sets.stored_shapes`; None where the task has none.
    """
    ref = task.router
    made = None
    if task.hyper is not None and hyper is not None:
        sizes = hyper_sizes(manifest, task, task.hyper)
        made = Hyper(task.hyper.kind, sizes, hyper, manifest.generation)
    routers = {}
    for layer, experts in manifest.visible_layers(task).items():
        if ref.grouping is None:
            routers[layer] = Router(tensors[router_tensor_name(layer)], experts)
        else:
            routers[layer] = _grouped(manifest, task, layer, experts, tensors)
    return Mixture(
        task=task.name,
        digest=fields_digest(
            str(manifest.generation), task.name, ref.model_dump_json(), task.hyper.digest if task.hyper else ""
        ),
        top_k=ref.top_k,
        routers=routers,
        kind=ref.kind,
        by_request=ref.grouping is not None and ref.grouping.scope == "request",
        hyper=made,
    )


def _grouped(manifest: Manifest, task: Task, layer: int, experts: tuple[str, ...], tensors: Tensors) -> Router:
    grouping = task.router.grouping
    assert grouping is not None, "asked by the caller"
    group_of = dict(zip(task.router.visible, grouping.groups, strict=True))
    labels = tuple(group_of[digest] for digest in experts)
    weight = tensors.get(router_tensor_name(layer))
    bias = tensors.get(router_tensor_name(layer, "logits"))
    general = grouping.general
    has_general = general is not None and any(unit.layer == layer for unit in manifest.expert_set(general).units)
    return grouped_router(
        grouping,
        experts=experts,
        labels=labels,
        weight=torch.zeros(len(experts), manifest.base.width) if weight is None else weight,
        bias=bias,
        group_weight=tensors[router_tensor_name(layer, "group.weight")],
        group_bias=tensors[router_tensor_name(layer, "group.bias")],
        general=general if has_general else None,
    )


def grouped_router(
    grouping: Grouping,
    *,
    experts: tuple[str, ...],
    labels: tuple[str, ...],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    group_weight: torch.Tensor,
    group_bias: torch.Tensor,
    general: str | None,
) -> Router:
    """A layer's grouped router of its tensors; the general expert, if the layer has it, becomes the last column.

    Args:
        grouping: its parameters.
        experts: digests of the visible experts of this layer, E of them.
        labels: the group of each.
        weight: W_D [E, D].
        bias: static logits [E], or None.
        group_weight: W_G [G, D].
        group_bias: [G].
        general: digest of the general expert set where it has an expert in this layer.
    """
    names = grouping.names()
    members = [names.index(label) for label in labels]
    constant = None
    if general is not None:
        weight = torch.cat((weight, weight.new_zeros(1, weight.shape[1])))
        bias = None if bias is None else torch.cat((bias, bias.new_zeros(1)))
        constant = torch.tensor([*([0.0] * len(experts)), 1 - grouping.share], device=weight.device)
        members, experts, labels = [*members, -1], (*experts, general), (*labels, "")
    groups = LayerGroups(
        names=names,
        weight=group_weight,
        bias=group_bias,
        allowed=torch.tensor([name in labels for name in names], device=weight.device),
        member=torch.tensor(members, device=weight.device),
        share=grouping.share,
        tau_group=grouping.tau_group,
        tau_expert=grouping.tau_expert,
        epsilon=grouping.epsilon,
    )
    return Router(weight=weight, experts=experts, bias=bias, constant=constant, groups=groups, labels=labels)
