"""Target `gguf-lora`: a constant mixture as a LoRA adapter for llama.cpp, `adapter.gguf`.

It does not know how weights were chosen (`exporters.constant_mixture`). Names follow from the architecture; the base is
needed only for updates of q and k, whose rows llama.cpp orders by head.
Read first: llama.cpp scales a pair by `alpha / R`, with one alpha per file and each pair's own rank. Alpha is the
largest rank here, and B of a pair with a smaller one is multiplied by `R / alpha`. Of a Llama it rotates neighbouring
rows of q and k, where `transformers` rotates the two halves of a head, so rows of their B are interleaved.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch

from exporters.artefact import describe_file
from exporters.constant_mixture import Updates, fold, read_mixture
from exporters.manifest import Facts, FileEntry
from exporters.model_check import check_updates, load_own_base
from exporters.onnx_graph import Progress
from exporters.options import Source
from runtime.errors import ExportMismatchError, InvalidInputError
from runtime.model.attach import linear_name
from runtime.model.manifest import BaseRef, Target

FILE_NAME = "adapter.gguf"

_ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        "LlamaForCausalLM": "llama",
        "MistralForCausalLM": "llama",
        "Qwen2ForCausalLM": "qwen2",
        "Qwen3ForCausalLM": "qwen3",
        "Gemma3ForCausalLM": "gemma3",
    }
)
"""Class in `transformers` -> name in GGUF; a base of Mistral is converted as a Llama."""


def write_gguf(source: Source, folder: Path, on_progress: Progress) -> tuple[FileEntry, ...]:
    """Write the adapter into `folder`, read it back and compare every update.

    Raises:
        InvalidInputError: GGUF's name of the base's architecture is not known here, the base is needed and not given,
            or see `read_mixture`.
        UnknownTaskError, RepertoireError: see `read_mixture`.
        UnknownBaseError, BaseMismatchError: see `load_own_base`.
        ExportMismatchError: what is read back is something else.
    """
    weights, mixture = read_mixture(source)
    base = source.generation.manifest.base
    architecture = _ARCHITECTURES.get(base.architecture)
    if architecture is None:
        known = ", ".join(_ARCHITECTURES)
        raise InvalidInputError("base: architecture", base.architecture, f"must be one of {known}")
    updates = fold(mixture)
    heads = _heads(source, updates) if architecture == "llama" else {}
    names = _names(updates, base, architecture)
    on_progress(f"{FILE_NAME}: writing")
    _write(folder / FILE_NAME, updates, names, architecture, heads)

    on_progress(f"{FILE_NAME}: verifying")
    alpha, tensors = _read(folder / FILE_NAME, architecture)

    def product(layer: int, target: Target) -> torch.Tensor:
        a, b = (tensors[f"{names[layer, target]}.lora_{side}"].double() for side in "ab")
        rows = b if target not in heads else _swapped(b, (heads[target], len(b) // heads[target] // 2, 2))
        return (rows @ a) * (alpha / len(a))

    check = check_updates(FILE_NAME, mixture, product)
    facts: Facts = {
        "architecture": architecture,
        "weights": {str(layer): dict(experts) for layer, experts in weights.items()},
    }
    return (describe_file(folder / FILE_NAME, facts=facts, checks=[check]),)


def _heads(source: Source, updates: Updates) -> dict[Target, int]:
    """Heads of q and of k, whose rows are written in another order; empty where neither is updated."""
    turned = next((target for linears in updates.values() for target in linears if target in ("q", "k")), None)
    if turned is None:
        return {}
    if source.options.base is None:
        raise InvalidInputError("base", None, f"updates of {turned} are ordered by head: give the base")
    config = load_own_base(source).model.config
    return {"q": config.num_attention_heads, "k": config.num_key_value_heads}


def _swapped(rows: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """`rows` [out, R], whose first dimension is `shape`, with the last two parts of it swapped."""
    return rows.reshape(*shape, -1).transpose(1, 2).reshape(rows.shape)


def _names(updates: Updates, base: BaseRef, architecture: str) -> dict[tuple[int, Target], str]:
    """Layer and linear -> name of the weight in GGUF, such as `blk.2.ffn_gate.weight`."""
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, base.num_layers)
    return {
        (layer, target): f"{table.get_name(f'model.layers.{layer}.{linear_name(target)}')}.weight"
        for layer, linears in updates.items()
        for target in linears
    }


def _write(
    path: Path,
    updates: Updates,
    names: Mapping[tuple[int, Target], str],
    architecture: str,
    heads: Mapping[Target, int],
) -> None:
    alpha = max(update.rank for linears in updates.values() for update in linears.values())
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        for layer, linears in updates.items():
            for target, update in linears.items():
                b = update.b * (update.rank / alpha)
                if target in heads:
                    b = _swapped(b, (heads[target], 2, len(b) // heads[target] // 2))
                writer.add_tensor(f"{names[layer, target]}.lora_a", update.a.contiguous().numpy())
                writer.add_tensor(f"{names[layer, target]}.lora_b", b.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _read(path: Path, architecture: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Alpha and all tensors of the file as it lies on disk."""
    try:
        reader = gguf.GGUFReader(path)
        fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    except Exception as error:
        raise ExportMismatchError(f"{path.name}: gguf does not take it: {error}") from error
    wanted = {"general.type": "adapter", "general.architecture": architecture, "adapter.type": "lora"}
    found = {name: fields.get(name) for name in wanted}
    if found != wanted:
        raise ExportMismatchError(f"{path.name}: holds {found}, wanted is {wanted}")
    return float(fields["adapter.lora.alpha"]), tensors
