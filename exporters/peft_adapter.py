"""Target `peft`: a constant mixture as a PEFT LoRA adapter, `adapter_config.json` and `adapter_model.safetensors`.

It does not know how weights were chosen (`exporters.constant_mixture`).
Read first: weights and scales are folded into B, so alpha equals the rank everywhere and PEFT's factor is 1. Readers
that know neither `rank_pattern` nor `alpha_pattern` therefore scale right as well.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file

from exporters.artefact import describe_file
from exporters.constant_mixture import Updates, attached_mixture, fold, read_mixture
from exporters.manifest import Facts, FileEntry
from exporters.model_check import check_logits, check_updates, load_own_base, logits, random_prompts
from exporters.onnx_graph import Progress
from exporters.options import Source
from runtime.errors import ExportMismatchError
from runtime.model.attach import linear_name
from runtime.model.manifest import Target

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


def write_adapter(source: Source, folder: Path, on_progress: Progress) -> tuple[FileEntry, ...]:
    """Write the adapter into `folder`, load it with PEFT and compare it with the attached mixture.

    Raises:
        InvalidInputError, UnknownTaskError, RepertoireError: see `read_mixture`.
        UnknownBaseError, BaseMismatchError: see `load_own_base`.
        ExportMismatchError: PEFT does not take it, or computes something else.
    """
    weights, mixture = read_mixture(source)
    on_progress("loading the base")
    base = load_own_base(source)
    on_progress(f"{WEIGHTS_NAME}: writing")
    updates = fold(mixture)
    save_file(_tensors(updates), folder / WEIGHTS_NAME, metadata={"format": "pt"})
    _config(updates, base.info.name).save_pretrained(folder)

    on_progress(f"{WEIGHTS_NAME}: verifying in PEFT")
    stored: dict[str, torch.Tensor] = load_file(folder / WEIGHTS_NAME)

    def product(layer: int, target: Target) -> torch.Tensor:
        a, b = (stored[_tensor_name(layer, target, side)].double() for side in "AB")
        return b @ a

    updates_check = check_updates(WEIGHTS_NAME, mixture, product)
    prompts = random_prompts(base.info.vocab_size)
    with attached_mixture(base.model, mixture):
        wanted = logits(base.model, prompts)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a name it is about to drop
            adapted = peft.PeftModel.from_pretrained(base.model, folder, local_files_only=True)
    except Exception as error:
        raise ExportMismatchError(f"{WEIGHTS_NAME}: PEFT does not take it: {error}") from error
    checks = (updates_check, check_logits(WEIGHTS_NAME, logits(adapted, prompts), wanted))
    facts: Facts = {"weights": {str(layer): dict(experts) for layer, experts in weights.items()}}
    return (describe_file(folder / CONFIG_NAME), describe_file(folder / WEIGHTS_NAME, facts=facts, checks=checks))


def _module(layer: int, target: Target) -> str:
    return f"model.layers.{layer}.{linear_name(target)}"


def _tensor_name(layer: int, target: Target, side: str) -> str:
    return f"base_model.model.{_module(layer, target)}.lora_{side}.weight"


def _tensors(updates: Updates) -> dict[str, torch.Tensor]:
    return {
        _tensor_name(layer, target, side): tensor.contiguous()
        for layer, linears in updates.items()
        for target, update in linears.items()
        for side, tensor in (("A", update.a), ("B", update.b))
    }


def _config(updates: Updates, base_name: str) -> peft.LoraConfig:
    """The most common rank for all linears, and patterns for those of another."""
    ranks = {
        _module(layer, target): update.rank for layer, linears in updates.items() for target, update in linears.items()
    }
    counts = list(ranks.values())
    rank = max(sorted(set(counts)), key=counts.count)
    others = {name: other for name, other in ranks.items() if other != rank}
    kinds = {frozenset(linears) for linears in updates.values()}
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=dict(others),
        lora_dropout=0.0,
    )
    # Set after construction: as a set, which the constructor makes of it, the order in the file would be random.
    if len(kinds) == 1:
        config.target_modules = [f"{target}_proj" for target in sorted(kinds.pop())]
        config.layers_to_transform = list(updates)
    else:  # a layer lacks a linear that others have
        config.target_modules = sorted(ranks)
    return config
