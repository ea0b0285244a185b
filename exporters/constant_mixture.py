"""A mixture whose weights do not depend on the token: which experts with which weight in each layer, and their sum.

It knows nothing of file formats.
Read first: a routed mixture of several experts per layer has no static equal. Constant are a task whose router sees one
expert per layer, and weights that the caller gives: then `sum_e w_e scale_e B_e A_e` is one update of rank `sum R_e`,
exactly, its A the rows of all A_e and its B the columns of all `w_e scale_e B_e`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from exporters.options import Source
from runtime.errors import InvalidInputError
from runtime.model.attach import ExpertModule, attached, decoder_layers, mixture_layer
from runtime.model.expert import Expert, LowRank
from runtime.model.layer_names import is_named_as_llama
from runtime.model.manifest import TARGETS, BaseRef, Manifest, Target
from runtime.model.record import Digest

UNIFORM = "uniform"
ONLY_OWN = "only-own"

LayerWeights = Mapping[int, Mapping[Digest, float]]
"""Layer -> digest of the expert set -> its weight there."""


@dataclass(frozen=True)
class Term:
    """One expert of the sum and its weight."""

    weight: float
    expert: Expert


ConstantMixture = Mapping[int, tuple[Term, ...]]
"""Layer -> terms; layers without a term are the base's own."""

Updates = Mapping[int, Mapping[Target, LowRank]]
"""Layer -> linear -> the whole update `B A` with weights and scales in B, float32."""


def constant_weights(manifest: Manifest, task: str | None, weights: str | None) -> LayerWeights:
    """Decide the weight of every expert in every layer.

    Args:
        manifest: of the generation.
        task: whose mixture; not needed where `weights` names tasks.
        weights: None: the task's router, which must see one expert per layer. "uniform": 1/E for each of the E experts
            that the task sees in a layer. "only-own": 1 for the expert set that the task trained. Else
            "task=weight,...": that weight for the expert set which that task trained, in all its layers, as it is: a
            layer that lacks one of them is not made up for.

    Raises:
        InvalidInputError: the weights cannot be read, say nothing, or are missing for a routed task.
        UnknownTaskError: no such task.
    """
    if weights is not None and weights not in (UNIFORM, ONLY_OWN):
        if task is not None:
            raise InvalidInputError("task", task, f"the weights name their tasks themselves: {weights}")
        chosen = {_own(manifest, name): weight for name, weight in _parse(weights).items()}
        return _everywhere(manifest, chosen)
    if task is None:
        raise InvalidInputError("task", task, "name the task, or give weights such as red=0.7,blue=0.3")
    visible, kind = manifest.visible_layers(manifest.task(task)), manifest.task(task).router.kind
    if weights is None and manifest.task(task).hyper is not None:
        raise InvalidInputError(
            "task", task, f"it has hyper-adapters beside its experts; give weights to leave them out: {UNIFORM}, ..."
        )
    if weights == ONLY_OWN:
        return _everywhere(manifest, {_own(manifest, task): 1.0})
    routed = [layer for layer, experts in visible.items() if len(experts) > 1]
    if weights is None and kind == "grouped":
        raise InvalidInputError(
            "task", task, f"its router is grouped; give weights: {UNIFORM}, {ONLY_OWN} or task=weight,..."
        )
    if weights is None and routed:
        raise InvalidInputError(
            "task",
            task,
            f"its router chooses among experts token by token in layers {routed[0]}..{routed[-1]}, which no fixed "
            f"mixture equals; give weights: {UNIFORM}, {ONLY_OWN} or task=weight,...",
        )
    if not visible:
        raise InvalidInputError("task", task, "it sees no expert: its mixture is the base itself")
    return {layer: dict.fromkeys(experts, 1 / len(experts)) for layer, experts in visible.items()}


def read_mixture(source: Source) -> tuple[LayerWeights, ConstantMixture]:
    """Read the experts of the mixture that `source` orders.

    Raises:
        InvalidInputError, UnknownTaskError: see `constant_weights` and `check_linears`.
        RepertoireError: an expert cannot be read.
    """
    manifest = source.generation.manifest
    check_linears(manifest.base)
    layers = constant_weights(manifest, source.options.task, source.options.weights)
    terms = {layer: tuple(_terms(source, layer, weights)) for layer, weights in layers.items()}
    return layers, terms


def check_linears(base: BaseRef) -> None:
    """Check that the base's linears are those of Llama by name, one module each: exports know no others.

    Raises:
        InvalidInputError: they are not.
    """
    if not is_named_as_llama(base.architecture):
        raise InvalidInputError("base: architecture", base.architecture, "its linears are not named as Llama's")


def fold(mixture: ConstantMixture) -> Updates:
    """The sum of all terms per linear: A [sum R, in], B [out, sum R]."""
    return {
        layer: {target: _fold(members) for target in TARGETS if (members := _members(terms, target))}
        for layer, terms in mixture.items()
    }


def delta(terms: Iterable[Term], target: Target) -> torch.Tensor | None:
    """One layer's `sum_e w_e scale_e B_e A_e` [out, in] of a linear, in float64, to check files with; None: no term."""
    products = [weight * update.b.double() @ update.a.double() for weight, update in _members(terms, target)]
    return torch.stack(products).sum(0) if products else None


@contextmanager
def attached_mixture(model: nn.Module, mixture: ConstantMixture) -> Iterator[None]:
    """`model` with the mixture in its layers, and without it on leaving.

    The modules are those of a routed mixture: a router of zeros that keeps all E experts gives each 1/E, so an expert's
    scale carries `w_e E`.
    """
    layers = decoder_layers(model)
    ffns = {}
    for layer, terms in mixture.items():
        count = len(terms)
        experts = [
            ExpertModule(Expert(layer, term.expert.scale * term.weight * count, term.expert.updates), trainable=False)
            for term in terms
        ]
        width = layers[layer].mlp.gate_proj.in_features  # type: ignore[union-attr]
        router = torch.zeros(count, width)  # type: ignore[arg-type]
        ffns[layer] = mixture_layer(layers[layer], experts, router, top_k=count)
    with attached(model, ffns):
        yield


def _members(terms: Iterable[Term], target: Target) -> list[tuple[float, LowRank]]:
    return [(t.weight * t.expert.scale, t.expert.updates[target]) for t in terms if target in t.expert.updates]


def _fold(members: list[tuple[float, LowRank]]) -> LowRank:
    a = torch.cat([update.a.float() for _, update in members])
    b = torch.cat([update.b.float() * weight for weight, update in members], dim=1)
    return LowRank(a, b)


def _terms(source: Source, layer: int, weights: Mapping[Digest, float]) -> Iterator[Term]:
    manifest = source.generation.manifest
    for digest, weight in weights.items():
        entry = manifest.expert_set(digest)
        unit = next(unit for unit in entry.units if unit.layer == layer)
        yield Term(weight, source.repertoire.read_unit(entry, unit, manifest.base))


def _own(manifest: Manifest, task: str) -> Digest:
    digest = manifest.task(task).experts
    if digest is None:
        raise InvalidInputError("task", task, "it trained no experts of its own")
    return digest


def _everywhere(manifest: Manifest, weights: Mapping[Digest, float]) -> LayerWeights:
    layers: dict[int, dict[Digest, float]] = {}
    for digest, weight in weights.items():
        for unit in manifest.expert_set(digest).units:
            layers.setdefault(unit.layer, {})[digest] = weight
    return dict(sorted(layers.items()))


def _parse(text: str) -> dict[str, float]:
    form = f"must be {UNIFORM}, {ONLY_OWN} or task=weight,... with finite weights other than 0"
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        try:
            weight = float(number)
        except ValueError as error:
            raise InvalidInputError("weights", text, form) from error
        if not name or not math.isfinite(weight) or weight == 0:
            raise InvalidInputError("weights", text, form)
        if name in weights:
            raise InvalidInputError("weights", text, f"names {name} twice")
        weights[name] = weight
    return weights
