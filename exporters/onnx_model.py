"""Target `onnx-model`: the whole base with its mixtures and a KV cache as one graph, with expert slots as inputs.

It knows no task: experts are fed, so new tasks need no other export as long as the base and its first layer stay.
Read first: the file is verified on greedy answers, several tasks in one batch. With coded weights there are two checks,
as in `exporters.onnx_features`: with float32 activations the file must agree with torch on the same rounded weights;
then the linears round their inputs too, and what all the rounding costs against the base as it is is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import nn

from exporters.artefact import describe_file
from exporters.block_codes import BITS, Codes, decode, encode
from exporters.external_data import write_graph
from exporters.manifest import Check, Facts, FileEntry
from exporters.mixture_inputs import pack_mixtures
from exporters.model_check import LOGITS_TOLERANCE, check_logits, load_own_base
from exporters.model_quality import (
    Answers,
    Cases,
    agreement,
    attached_mixture,
    case_mixtures,
    divergence,
    entering,
    greedy_answer,
    logits_along,
    make_cases,
    perplexity,
)
from exporters.model_session import ModelSession
from exporters.nibble_codes import BITS as NIBBLE_BITS
from exporters.nibble_codes import decode_nibbles, encode_nibbles
from exporters.onnx_graph import Progress, describe_graph
from exporters.onnx_llama import DOMAIN, NORMS, check_llama, code_activations, linears
from exporters.onnx_model_graph import EMBEDDING, HEAD, Slots, model_graph
from exporters.options import FLOAT32, Source
from exporters.verify import SIZES, Tally, Wanted
from runtime.errors import ExportMismatchError, InvalidInputError
from runtime.model.base import BaseModel
from runtime.model.generation import Generation
from runtime.model.manifest import ATTENTION_TARGETS
from runtime.model.mixture import Mixture

GRAPH_NAME = "model.onnx"
WEIGHTS_NAME = "model.bin"

MAX_TASKS = 4
"""Tasks of a generation that verification answers at least, the newest: they see the most experts."""

PROMPTS_PER_TASK = 2

Mixtures = tuple[Mixture | None, ...]


@dataclass(frozen=True)
class Limits:
    """What rounding may cost: least top-1 agreement, largest mean KL in nats, largest ratio of perplexities."""

    agreement: float
    divergence: float
    perplexity_ratio: float


LIMITS = {
    FLOAT32: Limits(agreement=0.98, divergence=1e-4, perplexity_ratio=1.001),
    "int8": Limits(agreement=0.9, divergence=0.05, perplexity_ratio=1.05),
    "int4": Limits(agreement=0.6, divergence=0.5, perplexity_ratio=1.3),
}
"""By precision; a wrong scale or a shifted layer is far beyond the widest of them."""


def write_model(source: Source, folder: Path, on_progress: Progress) -> tuple[FileEntry, ...]:
    """Write graph and weights into `folder`, verified against torch.

    Raises:
        InvalidInputError: the base's architecture has no graph here, or no task fits it.
        UnknownBaseError, BaseMismatchError: see `load_own_base`.
        RepertoireError: an expert cannot be read.
        ExportMismatchError: the files compute something else, or rounding costs too much.
    """
    generation, precision = source.generation, source.options.precision or FLOAT32
    if generation.manifest.tasks and not generation.mixtures:
        names = ", ".join(generation.manifest.task_names())
        raise InvalidInputError("target", "onnx-model", f"it can take none of the tasks {names}")
    on_progress("loading the base")
    base = load_own_base(source)
    check_llama(base)
    tasks = (None, *answered(generation.mixtures))
    cases = make_cases(base, generation.template, tasks, PROMPTS_PER_TASK)
    on_progress(f"answering {len(cases.tasks)} prompts in torch")
    residual = entering(base, cases, generation.manifest.first_layer)
    mixtures = case_mixtures(generation, cases, residual)
    exact = _answers(source, base, cases, mixtures)
    exact_perplexity = perplexity(base, lambda ids: _torch_logits(base, ids))

    on_progress(f"{GRAPH_NAME}: writing")
    path = folder / GRAPH_NAME
    facts: Facts = {
        "precision": precision,
        "first_layer": generation.manifest.first_layer,
        "max_tokens": base.model.config.max_position_embeddings,
        "eos_token_ids": [*base.eos_token_ids],
    }
    model = _write(path, base, source, facts)

    on_progress(f"{GRAPH_NAME}: verifying in onnxruntime")
    slots = pack_mixtures(source.repertoire, generation, mixtures)
    is_rounded = precision != FLOAT32
    wanted = _logits_along(source, base, cases, mixtures, exact.tokens) if is_rounded else exact.logits
    residual = entering(base, cases, generation.manifest.first_layer)
    del base.model.model.layers  # the weights are not needed any more
    session = ModelSession(path, slots)
    got = session.logits_along(cases.ids, exact.tokens)
    checks = _compare(got, wanted)
    if _slots(generation).kinds:
        session.start(slots)
        checks += (check_logits(GRAPH_NAME, [*session.entering(cases.ids)], [*residual], output="entering"),)
    if is_rounded:
        stored = onnx.load_model(path, load_external_data=False)
        code_activations(stored)
        path.write_bytes(stored.SerializeToString(deterministic=True))
        session = ModelSession(path, slots)
        got = session.logits_along(cases.ids, exact.tokens)
    plain = pack_mixtures(source.repertoire, generation, [None])

    def predict(ids: torch.Tensor) -> torch.Tensor:
        session.start(plain)
        return session.step(ids.unsqueeze(0), keep=len(ids))[0]

    measured: dict[str, float] = {
        "agreement": agreement(got, exact.logits),
        "divergence": divergence(got, exact.logits),
        "perplexity": perplexity(base, predict),
        "perplexity_torch": exact_perplexity,
    }
    _check_limits(measured, LIMITS[precision])
    facts |= measured
    return (describe_graph(path, model, facts, checks), describe_file(folder / WEIGHTS_NAME))


def _slots(generation: Generation) -> Slots:
    units = [unit for entry in generation.manifest.experts for unit in entry.units]
    mixtures = generation.mixtures.values()
    return Slots(
        attends=any(target in ATTENTION_TARGETS for unit in units for target in unit.ranks),
        kinds=any(mixture.kind != "top_k" for mixture in mixtures),
        hyper=any(mixture.hyper is not None for mixture in mixtures),
    )


def answered(mixtures: Mapping[str, Mixture]) -> tuple[str, ...]:
    """The tasks that verification answers: the newest of every sort of mixture, and the newest of all, oldest first."""
    newest: dict[object, str] = {}
    for name, mixture in reversed(list(mixtures.items())):
        newest.setdefault(_sort(mixture), name)
    chosen = {*newest.values(), *list(mixtures)[-MAX_TASKS:]}
    return tuple(name for name in mixtures if name in chosen)


def _sort(mixture: Mixture) -> tuple[object, ...]:
    router = next(iter(mixture.routers.values()), None)
    is_static = router is not None and router.bias is not None
    has_general = router is not None and router.constant is not None
    return mixture.kind, mixture.by_request, is_static, has_general, mixture.hyper is not None


def _write(path: Path, base: BaseModel, source: Source, facts: Facts) -> onnx.ModelProto:
    """Write graph and weights; the base's weights are rounded as the file's are."""
    is_tied = base.model.lm_head.weight is base.model.model.embed_tokens.weight
    precision = source.options.precision or FLOAT32
    bits = {} if precision == FLOAT32 else _bits(base, precision)
    first_layer = source.generation.manifest.first_layer
    graph = model_graph(base, first_layer, bits, _slots(source.generation), is_tied=is_tied)
    tensors = _tensors(base, bits, is_tied=is_tied)
    return write_graph(
        path,
        graph,
        tensors,
        facts,
        weights=WEIGHTS_NAME,
        domains=[DOMAIN] if bits else [],
        opset=source.options.chosen_opset(),
    )


def _check_limits(measured: dict[str, float], limits: Limits) -> None:
    ratio = measured["perplexity"] / measured["perplexity_torch"]
    for name, value, is_good, limit in (
        ("agreement", measured["agreement"], measured["agreement"] >= limits.agreement, limits.agreement),
        ("divergence", measured["divergence"], measured["divergence"] <= limits.divergence, limits.divergence),
        ("ratio of perplexities", ratio, ratio <= limits.perplexity_ratio, limits.perplexity_ratio),
    ):
        if not is_good:  # true for NaN as well
            raise ExportMismatchError(f"{GRAPH_NAME}: {name} with torch is {value:.4g}, the limit is {limit:g}")


def _answers(source: Source, base: BaseModel, cases: Cases, mixtures: Mixtures) -> Answers:
    tokens, logits = [], []
    for ids, mixture in zip(cases.ids, mixtures, strict=True):
        with attached_mixture(source.repertoire, source.generation, mixture, base.model):
            chosen, rows = greedy_answer(base.model, ids)
        tokens.append(chosen)
        logits.append(rows)
    return Answers(torch.stack(tokens), torch.stack(logits))


def _logits_along(
    source: Source, base: BaseModel, cases: Cases, mixtures: Mixtures, tokens: torch.Tensor
) -> torch.Tensor:
    rows = []
    for ids, mixture, answer in zip(cases.ids, mixtures, tokens, strict=True):
        with attached_mixture(source.repertoire, source.generation, mixture, base.model):
            rows.append(logits_along(base.model, ids, answer))
    return torch.stack(rows)


@torch.no_grad()
def _torch_logits(base: BaseModel, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = base.model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0].float()
    return logits


def _bits(base: BaseModel, precision: str) -> dict[str, int]:
    """Bits of every linear's codes; the head and the embedding, which are small and delicate, have 8."""
    bits = NIBBLE_BITS if precision == "int4" else BITS
    return {**dict.fromkeys(linears(base, base.info.num_layers), bits), HEAD: BITS}


def _tensors(base: BaseModel, bits: dict[str, int], *, is_tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Constants by name, one at a time; a coded weight is replaced in the base by what its codes stand for."""
    model = base.model.model
    yield "inv_freq", model.rotary_emb.inv_freq.float()
    yield "final_norm_weight", model.norm.weight.float()
    for i, layer in enumerate(model.layers):
        for name, path in NORMS.items():
            yield f"l{i}_{name}_weight", layer.get_submodule(path).weight.float()
    tables: dict[str, nn.Module] = {**linears(base, base.info.num_layers), HEAD: base.model.lm_head}
    if not is_tied:
        tables[EMBEDDING] = model.embed_tokens
    for name, module in tables.items():
        weight = module.weight
        assert isinstance(weight, torch.Tensor), name
        if not bits:
            yield f"{name}_weight", weight
            continue
        coded, rounded = _round(weight, bits.get(name, BITS))
        with torch.no_grad():
            weight.copy_(rounded)
        yield f"{name}_codes", coded.codes
        yield f"{name}_scales", coded.scales


def _round(weight: torch.Tensor, bits: int) -> tuple[Codes, torch.Tensor]:
    if bits == NIBBLE_BITS:
        coded = encode_nibbles(weight)
        return coded, decode_nibbles(coded, weight.shape[1])
    coded = encode(weight)
    return coded, decode(coded, weight.shape[1])


def _compare(got: torch.Tensor, wanted: torch.Tensor) -> tuple[Check, ...]:
    """Compare logits [N, 64, V] and the tokens that they choose, where torch's choice is above rounding."""
    logits, tokens = Tally("logits"), Tally("tokens")
    for one, other in zip(got, wanted, strict=True):
        scale = other.abs().max(1, keepdim=True).values
        expected = Wanted(other, scale=scale, tolerance=LOGITS_TOLERANCE)
        logits.compare(f"{GRAPH_NAME}: output logits", one.numpy(), expected, SIZES[-1])
        best = other.topk(2, dim=1).values
        settled = best[:, 0] - best[:, 1] > 2 * LOGITS_TOLERANCE * scale[:, 0].clamp(min=1)
        choice = Wanted(other.argmax(1), settled=settled)
        tokens.compare(f"{GRAPH_NAME}: token", one.argmax(1).numpy(), choice, SIZES[-1])
    return logits.check(), tokens.check()
