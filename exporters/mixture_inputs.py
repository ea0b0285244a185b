"""The expert slots of `onnx-model`: the mixtures of a batch, packed as the inputs that the graph takes.

It does not know the graph, only its input names.
Read first: layers are stacked from `first_layer` on and filled up with zeros to the widest of them. A column c of the
router is one visible expert of one mixture, row s of `a` and `b` one rank of one expert; an expert that several
mixtures see is packed once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runtime.errors import InvalidInputError
from runtime.model.expert import Expert
from runtime.model.generation import Generation
from runtime.model.manifest import ATTENTION_TARGETS, FFN_TARGETS, BaseRef, Target
from runtime.model.mixture import Mixture
from runtime.model.repertoire import Repertoire

Inputs = dict[str, torch.Tensor]


def mixture_inputs(repertoire: Repertoire, generation: Generation, tasks: Sequence[str | None]) -> Inputs:
    """Read the experts of the tasks and pack them.

    Args:
        repertoire: where the experts lie.
        generation: which routers and experts.
        tasks: of each of the B sequences; None is the plain base.

    Returns:
        by input name, with M layers from `first_layer` on, C router columns and S rank rows, at least one of each:
        `router` [M, C, D] float32; `allowed` [M, B, C] bool, the columns of a sequence; `top_k` [B] int64; and for
        each linear t `t_a` [M, S_t, in] and `t_b` [M, S_t, out] float32, scales multiplied into `t_b`, and `t_spread`
        [M, C, S_t] float32, 1 where column c scores the expert that row s belongs to.

    Raises:
        UnknownTaskError: no such task.
        InvalidInputError: see `check_slots`.
        RepertoireError: an expert or a router cannot be read.
    """
    manifest = generation.manifest
    mixtures = {task: generation.mixture(task) for task in dict.fromkeys(tasks) if task is not None}
    for mixture in mixtures.values():
        check_slots(generation, mixture)
    experts = {
        (unit.layer, entry.digest): repertoire.read_unit(entry, unit, manifest.base)
        for mixture in mixtures.values()
        for entry, unit in generation.visible_units(mixture)
    }
    layers = [
        _pack_layer(layer, tasks, mixtures, experts, manifest.base)
        for layer in range(manifest.first_layer, manifest.base.num_layers)
    ]
    stacked = {name: _stack([packed[name] for packed in layers]) for name in layers[0]}
    top_k = [1 if task is None else mixtures[task].top_k for task in tasks]
    return stacked | {"top_k": torch.tensor(top_k)}


def check_slots(generation: Generation, mixture: Mixture) -> None:
    """Refuse a mixture for which the graph has no slots.

    Raises:
        InvalidInputError: its router is not top-k, it has hyper-adapters, or one of its experts updates attention.
    """
    refusal = slots_refusal(mixture)
    if refusal is not None:
        raise InvalidInputError("task", mixture.task, f"onnx-model cannot take it: {refusal}")
    for entry, unit in generation.visible_units(mixture):
        attends = [target for target in unit.ranks if target in ATTENTION_TARGETS]
        if attends:
            problem = f"task {mixture.task} sees experts of {entry.task} that update {attends[0]}, beside the FFN"
            raise InvalidInputError("target", "onnx-model", problem)


def slots_refusal(mixture: Mixture) -> str | None:
    """Why the graph has no slots for a mixture; None where it has."""
    if mixture.hyper is not None:
        return "it has hyper-adapters beside its experts"
    return None if mixture.kind == "top_k" else f"its router is {mixture.kind}"


def _pack_layer(
    layer: int,
    tasks: Sequence[str | None],
    mixtures: dict[str, Mixture],
    experts: dict[tuple[int, str], Expert],
    base: BaseRef,
) -> Inputs:
    columns: list[str] = []
    owner: list[str] = []
    rows: list[torch.Tensor] = []
    for task, mixture in mixtures.items():
        if layer in mixture.routers:
            router = mixture.routers[layer]
            columns += router.experts
            owner += [task] * len(router.experts)
            rows.append(router.weight.float())
    packed = {
        "router": torch.cat([*rows, torch.zeros(int(not columns), base.width)]),
        "allowed": torch.tensor([[task == column for column in owner] or [False] for task in tasks]),
    }
    here = {digest: expert for (place, digest), expert in experts.items() if place == layer}
    for target in FFN_TARGETS:
        packed |= _pack_linear(target, columns, here, base)
    return packed


def _pack_linear(target: Target, columns: Sequence[str], experts: dict[str, Expert], base: BaseRef) -> Inputs:
    wide, narrow = (base.ffn_width, base.width) if target == "down" else (base.width, base.ffn_width)
    members = {digest: expert for digest, expert in experts.items() if target in expert.updates}
    owner = [digest for digest, expert in members.items() for _ in range(expert.updates[target].rank)]
    scored = [[float(column == digest) for digest in owner] or [0.0] for column in columns]
    none = int(not owner)  # one row of zeros then
    return {
        f"{target}_a": torch.cat([*(e.updates[target].a.float() for e in members.values()), torch.zeros(none, wide)]),
        f"{target}_b": torch.cat(
            [*(e.updates[target].b.t().float() * e.scale for e in members.values()), torch.zeros(none, narrow)]
        ),
        f"{target}_spread": torch.tensor(scored or [[0.0] * max(1, len(owner))]),
    }


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack matrices [*, *] along a new first dimension, each filled up to the largest."""
    heights, widths = ([tensor.shape[side] for tensor in tensors] for side in (0, 1))
    stacked = tensors[0].new_zeros(len(tensors), max(heights), max(widths))
    for place, tensor in zip(stacked, tensors, strict=True):
        place[: tensor.shape[0], : tensor.shape[1]] = tensor
    return stacked
