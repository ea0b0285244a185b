"""Target `onnx-router`: a task's routers of all layers as one graph per task, whatever their kind.

It does not know the experts, only the columns they stand for; `facts` name them.
Read first: the routers of all layers are stacked over the task's whole visible set. Slot 0 is a layer without any
expert, and a layer that has no router falls into it: its weights are all zero. The graph of grouped routers is in
`exporters.onnx_grouped`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from exporters.manifest import Facts, FileEntry
from exporters.onnx_graph import Progress, build_model, write_verified
from exporters.onnx_grouped import START, grouped_graph, grouped_scale, grouped_settled, grouped_tensors
from exporters.opsets import OPSET
from exporters.verify import SIZES, TOLERANCE, Case, Wanted
from runtime.model.generation import Generation
from runtime.model.manifest import Manifest
from runtime.model.mixture import Mixture, weigh

_GRAPH = """
    router_weight = Gather<axis = 0>(router_weights, slot)
    has_expert = Gather<axis = 0>(has_experts, slot)
    logits = MatMul(x, router_weight)
    never = Constant<value_float = -1e30>()
    scores = {score}(logits)
    masked = Where(has_expert, scores, never)
    num_chosen = Constant<value_ints = [{num_chosen}]>()
    chosen_logits, columns = TopK<axis = 1>(masked, num_chosen)
    probabilities = Softmax<axis = 1>(chosen_logits)
    is_real = Greater(chosen_logits, never)
    nothing = Constant<value_float = 0.0>()
    chosen_weights = Where(is_real, probabilities, nothing)
    shape = Shape(logits)
    no_weights = ConstantOfShape<value = float[1] {{0.0}}>(shape)
    weights = ScatterElements<axis = 1>(no_weights, columns, chosen_weights)
}}
"""

_SCORES: Mapping[str, str] = MappingProxyType({"top_k": "Identity", "arrow": "Abs"})
"""Kind of router -> the operation that makes scores of its logits."""


def write_routers(
    generation: Generation, folder: Path, on_progress: Progress, *, opset: int = OPSET
) -> tuple[FileEntry, ...]:
    """Write `<task>.onnx` into `folder` for every task, verified; a task that sees no expert has no router to write.

    Raises:
        ExportMismatchError: see `exporters.verify`.
    """
    entries = []
    for mixture in generation.mixtures.values():
        ref = generation.manifest.task(mixture.task).router
        visible = ref.all_experts()
        if not visible:
            continue
        facts: Facts = {
            "task": mixture.task,
            "columns": list(visible),
            "layers": list(mixture.routers),
            "top_k": mixture.top_k,
            "kind": mixture.kind,
        }
        columns, width = router_columns(generation.manifest, mixture.task), generation.manifest.base.width
        if ref.grouping is not None:
            facts["grouping"] = ref.grouping.model_dump(mode="json")
            graph = grouped_graph(mixture, width, len(visible))
            tensors = grouped_tensors(mixture, columns, len(visible))
        else:
            graph = (START + _GRAPH).format(
                width=width,
                num_experts=len(visible),
                num_chosen=min(mixture.top_k, len(visible)),
                score=_SCORES[mixture.kind],
            )
            tensors = _tensors(mixture, columns, len(visible))
        model = build_model(graph, tensors, facts, opset=opset)
        cases = router_cases(mixture, columns, len(visible))
        entries.append(write_verified(folder / f"{mixture.task}.onnx", model, facts, cases, on_progress))
    return tuple(entries)


def router_refusal(mixture: Mixture) -> str | None:
    """Why a mixture's router alone would mislead; None where it does not."""
    if mixture.hyper is None:
        return None
    return "it has hyper-adapters beside its experts, which no router weighs"


def router_columns(manifest: Manifest, task: str) -> dict[int, list[int]]:
    """For every layer the columns of the experts that have it, in the order of the router's rows."""
    columns: dict[int, list[int]] = {}
    for column, digest in enumerate(manifest.task(task).router.all_experts()):
        for unit in manifest.expert_set(digest).units:
            columns.setdefault(unit.layer, []).append(column)
    return columns


def _tensors(mixture: Mixture, columns: dict[int, list[int]], num_experts: int) -> dict[str, torch.Tensor]:
    num_slots, width = len(mixture.routers) + 1, next(iter(mixture.routers.values())).weight.shape[1]
    weights = torch.zeros(num_slots, width, num_experts)
    has_experts = torch.zeros(num_slots, num_experts, dtype=torch.bool)
    for slot, (layer, router) in enumerate(mixture.routers.items(), start=1):
        weights[slot, :, columns[layer]] = router.weight.t()
        has_experts[slot, columns[layer]] = True
    return {
        "layers": torch.tensor(list(mixture.routers)),
        "slots": torch.arange(1, num_slots),
        "router_weights": weights,
        "has_experts": has_experts,
    }


def router_cases(mixture: Mixture, columns: dict[int, list[int]], num_experts: int) -> Iterator[Case]:
    """Seeded tokens of every size in `SIZES` for every layer with a router, and two without, with torch's weights.

    Rows have a root mean square of 0.1 to 10, as behind the normalisation that precedes an FFN.
    """
    generator = torch.Generator().manual_seed(0)
    width = next(iter(mixture.routers.values())).weight.shape[1]
    for size in SIZES:
        magnitude = 10 ** (torch.rand(size, 1, generator=generator) * 2 - 1)
        x = torch.randn(size, width, generator=generator) * magnitude
        for layer in (*mixture.routers, max(mixture.routers) + 1, -1):
            weights = torch.zeros(size, num_experts)
            wanted = Wanted(weights)
            if layer in mixture.routers:
                router = mixture.routers[layer]
                weights[:, columns[layer]] = weigh(router, x, kind=mixture.kind, top_k=mixture.top_k)
                if mixture.kind == "grouped":
                    scale, settled = grouped_scale(router, x), grouped_settled(router, x)
                else:
                    logits = x @ router.weight.t()
                    scale = logits.abs().max(1, keepdim=True).values  # rounding of a logit grows with it
                    settled = _settled(logits.abs() if mixture.kind == "arrow" else logits, mixture.top_k)
                wanted = Wanted(weights, scale=scale, settled=settled)
            yield Case(size=size, inputs={"x": x, "layer": torch.tensor(layer)}, outputs={"weights": wanted})


def _settled(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """[T] bool: whether the last chosen logit is above the first one left out by more than rounding."""
    if logits.shape[1] <= top_k:
        return torch.ones(logits.shape[0], dtype=torch.bool)
    ordered = logits.sort(dim=1, descending=True).values
    rounding = TOLERANCE * logits.abs().max(1).values.clamp(min=1)
    return ordered[:, top_k - 1] - ordered[:, top_k] > rounding
