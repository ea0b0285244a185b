"""Target `merged`: a plain Hugging Face folder with a constant mixture folded into the base's weights.

It does not know how weights were chosen (`exporters.constant_mixture`).
Read first: the base's own files are copied tensor by tensor; only the linears that experts update change, to
`W + sum_e w_e scale_e B_e A_e` in float32, rounded to the dtype that the base is stored in.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from exporters.artefact import describe_file
from exporters.constant_mixture import ConstantMixture, Updates, attached_mixture, delta, fold, read_mixture
from exporters.manifest import Check, Facts, FileEntry
from exporters.model_check import LOGITS_TOLERANCE, check_logits, load_own_base, logits, random_prompts
from exporters.onnx_graph import Progress
from exporters.options import Source
from exporters.verify import Tally, Wanted
from runtime.errors import ExportMismatchError, TensorMismatchError
from runtime.model.attach import linear_name
from runtime.model.base import load_base
from runtime.model.manifest import TARGETS, Target

_COPIED = frozenset({".json", ".jinja", ".txt", ".model"})
"""Suffixes of a base's configuration and tokenizer files."""

_LINEAR = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:mlp|self_attn)\.(gate|up|down|q|k|v|o)_proj\.weight")


def write_merged(source: Source, folder: Path, on_progress: Progress) -> tuple[FileEntry, ...]:
    """Write the folder, load it and compare it with the attached mixture.

    Raises:
        InvalidInputError, UnknownTaskError, RepertoireError: see `read_mixture`.
        UnknownBaseError, BaseMismatchError: see `load_own_base`.
        TensorMismatchError: the base has no weight that an expert updates.
        ExportMismatchError: a weight, or what the folder computes, is not as it should be.
    """
    weights, mixture = read_mixture(source)
    on_progress("loading the base")
    base = load_own_base(source)
    prompts = random_prompts(base.info.vocab_size)
    with attached_mixture(base.model, mixture):
        wanted = logits(base.model, prompts)
    del base

    shards = sorted(source.base_folder().glob("*.safetensors"))
    updates = fold(mixture)
    for shard in shards:
        on_progress(f"{shard.name}: writing")
        _write_shard(shard, folder / shard.name, updates)
    for path in sorted(source.base_folder().iterdir()):
        if path.suffix in _COPIED and path.is_file():
            shutil.copyfile(path, folder / path.name)

    on_progress("verifying the weights")
    merged, rounding = _check_weights(shards, folder, mixture)
    on_progress("verifying in transformers")
    loaded = load_base(folder, dtype=torch.float32, device=torch.device("cpu"))
    tolerance = max(LOGITS_TOLERANCE, 8 * rounding)  # weights rounded to fewer bits than the reference has
    check = check_logits("merged", logits(loaded.model, prompts), wanted, tolerance=tolerance)
    facts: Facts = {"weights": {str(layer): dict(experts) for layer, experts in weights.items()}}
    return tuple(
        describe_file(path, facts=facts, checks=(merged, check))
        if path.suffix == ".safetensors"
        else describe_file(path)
        for path in sorted(folder.iterdir())
    )


def _updated(name: str, updates: Updates | ConstantMixture) -> tuple[int, Target] | None:
    """Layer and linear of a tensor that the updates may change."""
    match = _LINEAR.fullmatch(name)
    if match is None or int(match[1]) not in updates:
        return None
    return int(match[1]), next(target for target in TARGETS if target == match[2])


def _write_shard(old: Path, new: Path, updates: Updates) -> None:
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(old, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            tensor = tensors[name] = file.get_tensor(name)
            place = _updated(name, updates)
            update = updates[place[0]].get(place[1]) if place else None
            if update is not None:
                tensors[name] = torch.addmm(tensor.float(), update.b, update.a).to(tensor.dtype)
        save_file(tensors, new, metadata=file.metadata())


def _check_weights(shards: list[Path], folder: Path, mixture: ConstantMixture) -> tuple[Check, float]:
    """Compare every tensor with the base's: equal, or moved by the sum over the experts; and the dtype's rounding."""
    tally, rounding = Tally("weights"), 0.0
    missing = {(layer, target) for layer, linears in fold(mixture).items() for target in linears}
    for shard in shards:
        for name, before, after in _pairs(shard, folder / shard.name):
            place = _updated(name, mixture)
            moved = delta(mixture[place[0]], place[1]) if place else None
            if place is None or moved is None:
                if before.dtype != after.dtype or not torch.equal(before, after):
                    raise ExportMismatchError(f"{shard.name}: {name} is not the base's")
                continue
            missing.discard(place)
            eps = torch.finfo(before.dtype).eps
            rounding = max(rounding, eps)
            scale = before.double().abs() + moved.abs().max()
            error = (after.double() - before.double() - moved) / scale.clamp(min=1e-30)
            zero = Wanted(torch.zeros_like(error), scale=torch.ones_like(error), tolerance=4 * eps)
            tally.compare(f"{shard.name}: {name}", error.numpy(), zero, len(error))
    if missing:
        layer, target = min(missing)
        raise TensorMismatchError(
            f"the base has no weight model.layers.{layer}.{linear_name(target)}.weight to fold into"
        )
    return tally.check(), rounding


def _pairs(old: Path, new: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    with safe_open(old, "pt") as before, safe_open(new, "pt") as after:
        if list(before.keys()) != list(after.keys()):
            raise ExportMismatchError(f"{new.name}: holds other tensors than the base")
        for name in before.keys():  # noqa: SIM118 - not a dict
            yield name, before.get_tensor(name), after.get_tensor(name)
