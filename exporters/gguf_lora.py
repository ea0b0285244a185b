"""Target `gguf-lora`: a constant mixture as a LoRA adapter for llama.cpp, `adapter.gguf`.

It does not know how weights were chosen (`exporters.constant_mixture`), and needs no base: names follow from the
architecture.
Read first: llama.cpp scales a pair by `alpha / R`, with one alpha per file and each pair's own rank. Alpha is the
largest rank here, and B of a pair with a smaller one is multiplied by `R / alpha`.
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
from exporters.model_check import check_updates
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
        InvalidInputError: GGUF's name of the base's architecture is not known here; and see `read_mixture`.
        UnknownTaskError, RepertoireError: see `read_mixture`.
        ExportMismatchError: what is read back is something else.
    """
    weights, mixture = read_mixture(source)
    base = source.generation.manifest.base
    architecture = _ARCHITECTURES.get(base.architecture)
    if architecture is None:
        known = ", ".join(_ARCHITECTURES)
        raise InvalidInputError("base: architecture", base.architecture, f"must be one of {known}")
    updates = fold(mixture)
    turned = next((target for linears in updates.values() for target in linears if target in ("q", "k")), None)
    if architecture == "llama" and turned is not None:  # llama.cpp orders their rows otherwise
        raise InvalidInputError("target", "gguf-lora", f"updates of {turned} cannot be written for this architecture")
    names = _names(updates, base, architecture)
    on_progress(f"{FILE_NAME}: writing")
    _write(folder / FILE_NAME, updates, names, architecture)

    on_progress(f"{FILE_NAME}: verifying")
    alpha, tensors = _read(folder / FILE_NAME, architecture)

    def product(layer: int, target: Target) -> torch.Tensor:
        a, b = (tensors[f"{names[layer, target]}.lora_{side}"].double() for side in "ab")
        return (b @ a) * (alpha / len(a))

    check = check_updates(FILE_NAME, mixture, product)
    facts: Facts = {
        "architecture": architecture,
        "weights": {str(layer): dict(experts) for layer, experts in weights.items()},
    }
    return (describe_file(folder / FILE_NAME, facts=facts, checks=[check]),)


def _names(updates: Updates, base: BaseRef, architecture: str) -> dict[tuple[int, Target], str]:
    """Layer and linear -> name of the weight in GGUF, such as `blk.2.ffn_gate.weight`."""
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, base.num_layers)
    return {
        (layer, target): f"{table.get_name(f'model.layers.{layer}.{linear_name(target)}')}.weight"
        for layer, linears in updates.items()
        for target in linears
    }


def _write(path: Path, updates: Updates, names: Mapping[tuple[int, Target], str], architecture: str) -> None:
    alpha = max(update.rank for linears in updates.values() for update in linears.values())
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        for layer, linears in updates.items():
            for target, update in linears.items():
                b = update.b * (update.rank / alpha)
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
