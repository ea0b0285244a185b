"""Target `onnx-features`: from text to the locator's feature without torch: tokenizer, embedding, lower layers.

It does not know the tasks; with `onnx-locator` of the same generation its files are all that `greenroom locate` needs.
Read first: weights are rounded (linears to 8-bit codes, embeddings to float16), so there are two checks. With float32
activations the files must agree with torch on the same rounded weights, to float32's rounding. Then one attribute lets
the linears round their inputs too, and what the files compute is compared with the base as it is: what rounding costs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.external_data_helper
import tokenizers
import torch

from exporters.artefact import describe_file
from exporters.block_codes import decode, encode
from exporters.manifest import Check, Facts, FileEntry
from exporters.model_check import load_own_base, random_prompts
from exporters.onnx_graph import Progress, build_model, describe_graph
from exporters.onnx_llama import DOMAIN, check_llama, code_activations, linears, llama_graph, llama_tensors
from exporters.options import Source
from exporters.verify import Tally, Wanted, open_session
from runtime.errors import ExportMismatchError, InvalidInputError
from runtime.model.attach import decoder_layers
from runtime.model.base import BaseModel
from runtime.model.generation import Generation
from runtime.model.locator import parts, pool
from runtime.model.manifest import Feature
from runtime.model.prompt import PromptTemplate

GRAPH_NAME = "features.onnx"
WEIGHTS_NAME = "features.bin"
EMBEDDING_NAME = "embedding.npy"
TOKENIZER_NAME = "tokenizer.json"

TOLERANCE = 1e-4
"""Largest error of a feature in units of the prompt's largest: rounding over the layers."""

ROUNDING_TOLERANCE = 0.1
"""Largest error that rounding weights and activations may cause, in the same units."""

MIN_AGREEMENT = 0.98
"""Share of the given prompts that must be located as torch locates them."""

_SAMPLES = ("", "one two", "  67  8\n", "<|im_end|> <s> [INST]", "\u00e9\u4e2d\U0001f600")

Features = list[torch.Tensor]


def write_features(source: Source, folder: Path, on_progress: Progress) -> tuple[FileEntry, ...]:
    """Write graph, weights, embedding and tokenizer into `folder`, verified against torch.

    Raises:
        InvalidInputError: the base's architecture has no graph here, or a row of the prompts has no input.
        UnknownBaseError, BaseMismatchError: see `load_own_base`.
        ExportMismatchError: the files compute something else, or rounding costs too much.
    """
    generation = source.generation
    num_layers = generation.manifest.locator.layer
    texts = [] if source.options.prompts is None else _texts(source.options.prompts)
    on_progress("loading the base")
    base = load_own_base(source)
    check_llama(base)
    _write_tokenizer(folder / TOKENIZER_NAME, generation, base)
    random = [ids[0].tolist() for ids in random_prompts(base.info.vocab_size)]
    prompts = [*random, *(generation.template.encode(base.tokenizer, text) for text in texts)]
    on_progress(f"running the base on {len(prompts)} prompts")
    kind = generation.manifest.locator.feature
    exact = _torch_features(base, prompts, num_layers, kind)

    on_progress(f"{GRAPH_NAME}: writing")
    codes = {name: encode(module.weight) for name, module in linears(base, num_layers).items()}
    with torch.no_grad():
        for name, module in linears(base, num_layers).items():
            module.weight.copy_(decode(codes[name], module.in_features))
        embedding = base.model.get_input_embeddings().weight
        embedding.copy_(embedding.half())
    np.save(folder / EMBEDDING_NAME, embedding.half().numpy())
    prefix = PromptTemplate(generation.template.prefix, "").encode(base.tokenizer, "")
    suffix = PromptTemplate("", generation.template.suffix).encode(base.tokenizer, "")
    facts: Facts = {
        "feature": kind,
        "layer": num_layers,
        "prefix_ids": [*prefix],
        "suffix_ids": [*suffix],
        "max_tokens": base.model.config.max_position_embeddings,
    }
    graph = llama_graph(base, num_layers, kind)
    model = build_model(
        graph,
        llama_tensors(base, num_layers, codes),
        facts,
        domains=[DOMAIN] if num_layers else [],
        opset=source.options.chosen_opset(),
    )
    _save(model, folder)

    on_progress(f"{GRAPH_NAME}: verifying in onnxruntime")
    rounded = _torch_features(base, random, num_layers, kind)
    check = _compare(GRAPH_NAME, "features", _file_features(folder, random), rounded, TOLERANCE)
    stored = onnx.load_model(folder / GRAPH_NAME, load_external_data=False)
    code_activations(stored)
    (folder / GRAPH_NAME).write_bytes(stored.SerializeToString(deterministic=True))
    got = _file_features(folder, prompts)
    loss = _compare(GRAPH_NAME, "features, rounding", got, exact, ROUNDING_TOLERANCE)
    if texts:
        facts |= _agreement(generation, got[len(random) :], exact[len(random) :])
    return (
        describe_graph(folder / GRAPH_NAME, model, facts, (check, loss)),
        *(describe_file(path) for path in sorted(folder.iterdir()) if path.name != GRAPH_NAME),
    )


def _write_tokenizer(path: Path, generation: Generation, base: BaseModel) -> None:
    """Write the tokenizer as it is used for a user's text; special tokens in it are switched off by the reader."""
    tokenizer = tokenizers.Tokenizer.from_str(base.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.save(str(path))
    read = tokenizers.Tokenizer.from_file(str(path))
    read.encode_special_tokens = True
    plain = PromptTemplate("", "")
    specials = base.tokenizer.all_special_tokens
    for text in (*_SAMPLES, *specials, generation.template.text):
        wanted = plain.encode(base.tokenizer, text)
        if read.encode(text, add_special_tokens=False).ids != wanted:
            raise ExportMismatchError(f"{path.name}: reads {text!r} in another way than the base's tokenizer")


def _save(model: onnx.ModelProto, folder: Path) -> None:
    """Write the graph, its weights beside it: so they can be mapped into memory, and may exceed 2 GB."""
    stored = onnx.ModelProto()
    stored.CopyFrom(model)
    onnx.external_data_helper.convert_model_to_external_data(stored, location=WEIGHTS_NAME)
    onnx.save_model(stored, folder / GRAPH_NAME)


class _Reached(Exception):  # noqa: N818 - it ends a forward pass, it reports nothing wrong
    def __init__(self, residual: torch.Tensor) -> None:
        super().__init__()
        self.residual = residual


def _stop(_layer: object, inputs: tuple[torch.Tensor, ...]) -> None:
    raise _Reached(inputs[0])


@torch.no_grad()
def _torch_features(base: BaseModel, prompts: Sequence[Sequence[int]], layer: int, kind: Feature) -> Features:
    """[D] of every prompt: what enters `layer`, pooled or in parts; the layers from there on are never run."""
    features = []
    hook = decoder_layers(base.model)[layer].register_forward_pre_hook(_stop)
    try:
        for ids in prompts:
            try:
                base.model.model(input_ids=torch.tensor([ids]), use_cache=False)
            except _Reached as reached:
                seen, words = reached.residual[0], base.model.get_input_embeddings()(torch.tensor(ids))
                features.append(parts(seen, words) if kind == "residual_parts" else pool(seen))
    finally:
        hook.remove()
    return features


def _file_features(folder: Path, prompts: Sequence[Sequence[int]]) -> Features:
    session = open_session(folder / GRAPH_NAME)
    embedding: Any = np.load(folder / EMBEDDING_NAME, mmap_mode="r")
    features = []
    for ids in prompts:
        try:
            (value,) = session.run(None, {"embeddings": embedding[list(ids)].astype(np.float32)})
        except Exception as error:
            raise ExportMismatchError(f"{GRAPH_NAME}: onnxruntime fails on {len(ids)} tokens: {error}") from error
        features.append(torch.from_numpy(value)[0])
    return features


def _compare(where: str, output: str, got: Features, wanted: Features, tolerance: float) -> Check:
    tally = Tally(output)
    for one, other in zip(got, wanted, strict=True):
        size = other.abs().max().clamp(min=1e-30)
        expected = Wanted((other / size).unsqueeze(0), scale=torch.ones(1, 1), tolerance=tolerance)
        tally.compare(f"{where}: {output}", (one / size).unsqueeze(0).numpy(), expected, 1)
    return tally.check()


def _agreement(generation: Generation, got: Features, wanted: Features) -> Facts:
    """How many prompts are located as torch locates them, and how far a score moves at most."""
    ours, theirs = (generation.locator.locate(torch.stack(features)) for features in (got, wanted))
    pairs = list(zip(ours, theirs, strict=True))
    same = sum(one.task == other.task for one, other in pairs)
    if same < MIN_AGREEMENT * len(got):
        raise ExportMismatchError(f"{GRAPH_NAME}: only {same} of {len(got)} prompts are located as torch locates them")
    moved = [abs(dict(one.scores)[task] - score) for one, other in pairs for task, score in other.scores]
    return {"prompts": len(got), "located_alike": same, "max_score_difference": max(moved, default=0.0)}


def _texts(path: Path) -> list[str]:
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            text = json.loads(line)["input"]
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInputError("prompts", str(path), f"line {number} has no input") from error
        if not isinstance(text, str):
            raise InvalidInputError("prompts", str(path), f"line {number}: the input is no text")
        texts.append(text)
    if not texts:
        raise InvalidInputError("prompts", str(path), "holds no row")
    return texts
