"""The expert slots of `onnx-model`: the mixtures of a batch, packed as the inputs that the graph takes.

It does not know the graph, only its input names.
Read first: layers are stacked from `first_layer` on and filled up with zeros to the widest of them. A column c of the
router is one visible expert of one mixture, row s of `a` and `b` one rank of one expert; an expert that several
mixtures see is packed once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from exporters.hyper_inputs import hyper_refusal, pack_hyper
from exporters.router_inputs import pack_routers
from runtime.errors import InvalidInputError
from runtime.model.control import fixed_for, summary
from runtime.model.expert import Expert, linear_widths
from runtime.model.generation import Generation
from runtime.model.manifest import FFN_TARGETS, TARGETS, BaseRef, Target
from runtime.model.mixture import LayerGroups, Mixture
from runtime.model.repertoire import Repertoire

Inputs = dict[str, torch.Tensor]


def mixture_inputs(
    repertoire: Repertoire,
    generation: Generation,
    tasks: Sequence[str | None],
    *,
    entering: torch.Tensor | None = None,
) -> Inputs:
    """Read the experts of the tasks and pack them, see `pack_mixtures`.

    Args:
        repertoire: where the experts lie.
        generation: which routers and experts.
        tasks: of each of the B sequences; None is the plain base.
        entering: [B, T, D], what enters the first layer with experts for the prompts; needed by routers that weigh
            whole prompts, and what the graph's output of this name gives.

    Raises:
        UnknownTaskError: no such task.
        InvalidInputError: see `hyper_refusal`, or it weighs whole prompts and `entering` is missing.
        RepertoireError: an expert or a router cannot be read.
    """
    mixtures: list[Mixture | None] = []
    for place, task in enumerate(tasks):
        mixture = None if task is None else generation.mixture(task)
        if mixture is not None and mixture.by_request:
            if entering is None:
                raise InvalidInputError("entering", None, f"the router of task {task} weighs whole prompts")
            mixture = fixed_for(mixture, summary(entering[place]))
        mixtures.append(mixture)
    return pack_mixtures(repertoire, generation, mixtures)


def pack_mixtures(repertoire: Repertoire, generation: Generation, mixtures: Sequence[Mixture | None]) -> Inputs:
    """Read the experts of B sequences' mixtures and pack them.

    Returns:
        by input name, with M layers from `first_layer` on, C router columns, G groups and S rank rows, at least one of
        each: `router` [M, C, D] float32; `allowed` [M, B, C] bool, the columns of a sequence that keeps the largest;
        `top_k` [B] int64; for each linear t `t_a` [M, S_t, in] and `t_b` [M, S_t, out] float32, scales multiplied into
        `t_b`, and `t_spread` [M, C, S_t] float32, 1 where column c scores the expert that row s belongs to; of kinds
        beside top-k `absolute` [M, C] bool, `router_bias` [M, C], `constant` [M, B, C], `group_router` [M, G, D],
        `group_bias` [M, G], `open_groups` [M, B, G] bool, `members` [M, G, C] bool, `share` [B] and `epsilon` [B]; of
        hyper-adapters what `pack_hyper` says, each with M before it.
        q, k, v and o are missing where the record of the base lacks their widths.

    Raises:
        InvalidInputError: see `hyper_refusal`.
        RepertoireError: an expert cannot be read.
    """
    manifest = generation.manifest
    distinct = {mixture.digest: mixture for mixture in mixtures if mixture is not None}
    for mixture in distinct.values():
        refusal = hyper_refusal(mixture)
        if refusal is not None:
            raise InvalidInputError("task", mixture.task, f"onnx-model cannot take it: {refusal}")
    experts = {
        (unit.layer, entry.digest): repertoire.read_unit(entry, unit, manifest.base)
        for mixture in distinct.values()
        for entry, unit in generation.visible_units(mixture)
    }
    sequences = [None if mixture is None else mixture.digest for mixture in mixtures]
    layers = []
    for layer in range(manifest.first_layer, manifest.base.num_layers):
        here = {digest: expert for (place, digest), expert in experts.items() if place == layer}
        columns, packed = pack_routers(layer, sequences, distinct, manifest.base.width)
        packed |= pack_hyper(layer, distinct.values(), manifest.base.width)
        for target in FFN_TARGETS if manifest.base.attention_width is None else TARGETS:
            packed |= _pack_linear(target, columns, here, manifest.base)
        layers.append(packed)
    stacked = {name: _stack([packed[name] for packed in layers]) for name in layers[0]}
    groups = [None if mixture is None else _groups(mixture) for mixture in mixtures]
    return stacked | {
        "top_k": torch.tensor([1 if mixture is None else mixture.top_k for mixture in mixtures]),
        "share": torch.tensor([0.0 if group is None else group.share for group in groups]),
        "epsilon": torch.tensor([0.0 if group is None else group.epsilon for group in groups]),
    }


def _groups(mixture: Mixture) -> LayerGroups | None:
    return next(iter(mixture.routers.values())).groups if mixture.routers else None


def fitting(inputs: Mapping[str, torch.Tensor], names: Collection[str]) -> Inputs:
    """Those of `inputs` that a file has; the others must say nothing.

    Raises:
        InvalidInputError: they do: a mixture needs slots that the file was made without.
    """
    for name in sorted(inputs.keys() - names):
        says = name in ("absolute", "constant", "open_groups", "hyper_sets") or name.endswith("_b")
        if says and inputs[name].any():
            raise InvalidInputError("slots", name, "the file has none; export it from a generation with such a task")
    return {name: tensor for name, tensor in inputs.items() if name in names}


def _pack_linear(target: Target, columns: Sequence[str], experts: dict[str, Expert], base: BaseRef) -> Inputs:
    wide, narrow = linear_widths(target, base)
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
    """Stack matrices [*, *], or vectors [*], along a new first dimension, each filled up to the largest."""
    if tensors[0].dim() == 1:
        return _stack([tensor.unsqueeze(0) for tensor in tensors]).squeeze(1)
    heights, widths = ([tensor.shape[side] for tensor in tensors] for side in (0, 1))
    stacked = tensors[0].new_zeros(len(tensors), max(heights), max(widths))
    for place, tensor in zip(stacked, tensors, strict=True):
        place[: tensor.shape[0], : tensor.shape[1]] = tensor
    return stacked
