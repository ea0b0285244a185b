"""Target `onnx-experts`: the experts' part of a layer's linears as graphs whose expert weights are inputs.

It knows no task and no expert: one pair of files serves all of them, and experts swap without another export.
Read first: packed as in `runtime.kernels.mixture`. Row r of `a` and `b` belongs to expert `owner[r]`, a column of
`weights`; scales are multiplied into `b`; `y += sum_r (A x)_r weights[owner[r]] B_r`. Ranks may differ, and a linear
that no expert updates has no rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from exporters.constant_mixture import check_linears
from exporters.manifest import Facts, FileEntry
from exporters.onnx_graph import Progress, build_model, write_verified
from exporters.options import Source
from exporters.verify import SIZES, Case, Wanted
from runtime.kernels.mixture import PackedUpdate, mixture_loop, pack
from runtime.model.expert import Expert, LowRank, linear_widths
from runtime.model.manifest import ATTENTION_TARGETS, BaseRef, Target

GATE_UP: tuple[Target, ...] = ("gate", "up")
DOWN: tuple[Target, ...] = ("down",)
QKV: tuple[Target, ...] = ("q", "k", "v")
OUT: tuple[Target, ...] = ("o",)

RANKS = ((1,), (4, 2, 8), (), (16, 3, 3, 64))
"""Per random case the ranks of the experts: one, mixed, no expert at all, many."""

_INPUTS = "float[{S}, {wide}] {t}_a, float[{S}, {narrow}] {t}_b, int64[{S}] {t}_owner"

_UPDATE = """
    {t}_a_columns = Transpose<perm = [1, 0]>({t}_a)
    {t}_inner = MatMul(x, {t}_a_columns)
    {t}_weights = Gather<axis = 1>(weights, {t}_owner)
    {t}_weighted = Mul({t}_inner, {t}_weights)
    {t}_update = MatMul({t}_weighted, {t}_b)
"""

Experts = Sequence[Expert]


def write_experts(source: Source, folder: Path, on_progress: Progress) -> tuple[FileEntry, ...]:
    """Write `gate-up.onnx` and `down.onnx` into `folder`, verified on random experts and on those of every task.

    Where an expert updates attention, `qkv.onnx` and `out.onnx` come beside them.

    Raises:
        InvalidInputError: see `check_linears`.
        RepertoireError: an expert cannot be read.
        ExportMismatchError: see `exporters.verify`.
    """
    base = source.generation.manifest.base
    check_linears(base)
    entries = []
    units = [unit for entry in source.generation.manifest.experts for unit in entry.units]
    files = [("gate-up.onnx", GATE_UP), ("down.onnx", DOWN)]
    if any(target in ATTENTION_TARGETS for unit in units for target in unit.ranks):
        files += [("qkv.onnx", QKV), ("out.onnx", OUT)]
    for name, targets in files:
        facts: Facts = {"targets": list(targets), "width": base.width, "ffn_width": base.ffn_width}
        model = build_model(_graph(targets, base), {}, facts, opset=source.options.chosen_opset())
        entries.append(write_verified(folder / name, model, facts, _cases(source, targets), on_progress))
    return tuple(entries)


def _graph(targets: Sequence[Target], base: BaseRef) -> str:
    wide = linear_widths(targets[0], base)[0]
    places = [
        {"t": target, "S": f"S_{target}", "wide": wide, "narrow": linear_widths(target, base)[1]} for target in targets
    ]
    inputs = ", ".join(_INPUTS.format(**place) for place in places)
    outputs = ", ".join(f"float[T, {place['narrow']}] {place['t']}_update" for place in places)
    body = "".join(_UPDATE.format(**place) for place in places)
    name = "_".join(targets)
    return f"{name} (float[T, {wide}] x, float[T, E] weights, {inputs}) => ({outputs}) {{{body}}}"


def _cases(source: Source, targets: Sequence[Target]) -> Iterator[Case]:
    """Tokens of every size, with random experts of the ranks in `RANKS` and with the stored ones of each task."""
    manifest, generator = source.generation.manifest, torch.Generator().manual_seed(0)
    for size in SIZES:
        for ranks in RANKS:
            experts = [_random_expert(rank, targets, manifest.base, generator) for rank in ranks]
            yield expert_case(experts, targets, manifest.base, size, generator)
    for mixture in source.generation.mixtures.values():
        for layer, router in list(mixture.routers.items())[:1]:
            stored = []
            for digest in router.experts:
                entry = manifest.expert_set(digest)
                unit = next(unit for unit in entry.units if unit.layer == layer)
                stored.append(source.repertoire.read_unit(entry, unit, manifest.base))
            yield expert_case(stored, targets, manifest.base, SIZES[-1], generator)


def expert_case(
    experts: Experts, targets: Sequence[Target], base: BaseRef, size: int, generator: torch.Generator
) -> Case:
    """`size` random tokens through `experts`, with random weights of which half are 0, as the loop computes it."""
    x = torch.randn(size, linear_widths(targets[0], base)[0], generator=generator)
    count = max(1, len(experts))
    weights = torch.rand(size, count, generator=generator) * (torch.rand(size, count, generator=generator) < 0.5)
    inputs, outputs = {"x": x, "weights": weights}, {}
    for target in targets:
        members = [(e, expert) for e, expert in enumerate(experts) if target in expert.updates]
        narrow = linear_widths(target, base)[1]
        if members:
            updates = [expert.updates[target] for _, expert in members]
            a, b = [update.a for update in updates], [update.b for update in updates]
            scales = [expert.scale for _, expert in members]
            columns = torch.tensor([e for e, _ in members])
            packed = pack(a, b, scales, dtype=torch.float32, device=torch.device("cpu"))
            packed = PackedUpdate(packed.a, packed.b, columns[packed.owner])
            value = mixture_loop(x, a, b, scales, weights[:, columns])
        else:
            nothing = torch.zeros(0, x.shape[1]), torch.zeros(0, narrow), torch.zeros(0, dtype=torch.int64)
            packed, value = PackedUpdate(*nothing), torch.zeros(size, narrow)
        inputs |= {f"{target}_a": packed.a, f"{target}_b": packed.b, f"{target}_owner": packed.owner}
        outputs[f"{target}_update"] = Wanted(value, scale=value.abs().max().expand_as(value))
    return Case(size=size, inputs=inputs, outputs=outputs)


def _random_expert(rank: int, targets: Sequence[Target], base: BaseRef, generator: torch.Generator) -> Expert:
    updates: dict[Target, LowRank] = {}
    for target in targets:
        wide, narrow = linear_widths(target, base)
        a = torch.randn(rank, wide, generator=generator) / wide**0.5
        updates[target] = LowRank(a, torch.randn(narrow, rank, generator=generator))
    return Expert(layer=0, scale=2.0, updates=updates)
