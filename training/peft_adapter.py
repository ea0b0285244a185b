"""A PEFT LoRA adapter on disk, read as the experts it stands for: one per layer.

It does not know repertoires, routers or locators.
Read first: what an adapter folder says of itself is checked against its tensors and against the base. Whatever would
make the experts compute something else than PEFT does is refused by name; nothing is dropped silently.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file

from runtime.errors import InvalidInputError, TensorMismatchError
from runtime.model.attach import linear_name
from runtime.model.expert import DTYPES, Expert, LowRank, linear_widths
from runtime.model.manifest import TARGETS, BaseRef, Target

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "use_dora": "DoRA scales the base's own weights",
        "modules_to_save": "it replaces whole modules of the base",
        "trainable_token_indices": "it changes token embeddings",
        "layer_replication": "it changes the number of layers",
        "target_parameters": "it updates parameters that are no linear of a layer",
        "fan_in_fan_out": "its matrices are transposed",
        "lora_bias": "it has biases",
        "use_qalora": "QALoRA pools the inputs",
        "use_bdlora": "BD-LoRA has block-diagonal matrices",
        "alora_invocation_tokens": "aLoRA acts on a part of the tokens",
        "arrow_config": "it routes among adapters of its own",
        "velora_config": "it is not a plain LoRA",
        "monteclora_config": "it is not a plain LoRA",
        "kasa_config": "it is not a plain LoRA",
        "megatron_config": "it is for another model library",
    }
)
"""Field of the configuration -> why an expert cannot be what it says."""

_HARMLESS_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Ways to begin that leave the base's weights as they are."""

_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>model\.layers\.(?P<layer>\d+)\.\w+\.\w+)\.lora_(?P<side>[AB])\.weight"
)

Linears = Mapping[tuple[int, Target], LowRank]


@dataclass(frozen=True)
class Adapter:
    """An adapter as experts.

    Args:
        experts: layer -> expert, all with one scale.
        dtype: in which they can be stored without loss, a key of `DTYPES`.
    """

    experts: Mapping[int, Expert]
    dtype: str


def read_adapter(folder: Path, base: BaseRef) -> Adapter:
    """Read `adapter_config.json` and `adapter_model.safetensors`.

    `y += scaling * B A x` in every linear, with `scaling = alpha / R`, or `alpha / sqrt(R)` for rsLoRA, alpha and R
    after `alpha_pattern` and `rank_pattern` (as PEFT computes it). Linears of another scaling than the most common one
    get the ratio multiplied into B, in float32.

    Raises:
        InvalidInputError: no such files, a kind of adapter that is no plain LoRA, or a module that no expert has.
        TensorMismatchError: tensors of another shape than the base or the configuration want, or missing ones.
    """
    raw = _read_config(folder / CONFIG_NAME)
    config = LoraConfig(**{name: value for name, value in raw.items() if name in LoraConfig.__dataclass_fields__})
    linears = _read_linears(folder / WEIGHTS_NAME, base)
    _check_complete(config, linears, base)
    scalings = {place: _scaling(config, place, update) for place, update in linears.items()}
    common = Counter(sorted(scalings.values())).most_common(1)[0][0]
    layers: dict[int, dict[Target, LowRank]] = {}
    for (layer, target), update in sorted(linears.items(), key=lambda item: (item[0][0], TARGETS.index(item[0][1]))):
        ratio = scalings[layer, target] / common
        b = update.b if ratio == 1 else update.b.float() * ratio
        layers.setdefault(layer, {})[target] = LowRank(update.a, b)
    dtypes = {
        tensor.dtype for linear in layers.values() for update in linear.values() for tensor in (update.a, update.b)
    }
    names = [name for name, dtype in DTYPES.items() if dtypes == {dtype}]
    experts = {layer: Expert(layer=layer, scale=common, updates=updates) for layer, updates in layers.items()}
    return Adapter(experts, names[0] if names else "float32")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InvalidInputError("adapter", str(path.parent), f"holds no {CONFIG_NAME}") from error
    except ValueError as error:
        raise InvalidInputError("adapter", str(path), f"is not JSON: {error}") from error
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        kind = raw.get("peft_type") if isinstance(raw, dict) else raw
        raise InvalidInputError("peft_type", kind, "only LORA adapters can become experts")
    for field, reason in _REFUSED.items():
        if raw.get(field):
            raise InvalidInputError(field, raw[field], f"cannot become an expert: {reason}")
    if raw.get("bias", "none") != "none":
        raise InvalidInputError("bias", raw["bias"], "cannot become an expert: it changes biases of the base")
    start = raw.get("init_lora_weights", True)
    if start not in _HARMLESS_STARTS:
        problem = "may have changed the base's weights; save it with PEFT's conversion to a plain LoRA"
        raise InvalidInputError("init_lora_weights", start, problem)
    unknown = sorted(
        name for name, value in raw.items() if value and name not in {*LoraConfig.__dataclass_fields__, "peft_version"}
    )
    if unknown:
        raise InvalidInputError("adapter_config", unknown[0], "is a field that this version of PEFT does not know")
    return raw


def _read_linears(path: Path, base: BaseRef) -> Linears:
    """Every pair of matrices, checked against the widths of the base."""
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except FileNotFoundError as error:
        problem = f"holds no {WEIGHTS_NAME}; pickled weights are never read"
        raise InvalidInputError("adapter", str(path.parent), problem) from error
    except SafetensorError as error:
        raise TensorMismatchError(f"{path}: not a safetensors file: {error}") from error
    targets = {linear_name(target): target for target in TARGETS}
    sides: dict[tuple[int, Target], dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        target = targets.get(match["module"].split(".", 3)[3]) if match else None
        if match is None or target is None:
            raise InvalidInputError(
                "module", name, f"no expert has it; known are {', '.join(targets)} of model.layers.N"
            )
        if int(match["layer"]) >= base.num_layers:
            raise InvalidInputError("module", name, f"the base has {base.num_layers} layers")
        sides.setdefault((int(match["layer"]), target), {})[match["side"]] = tensor
    linears = {}
    for (layer, target), pair in sides.items():
        where = f"{path.name}: layer {layer} {linear_name(target)}"
        if len(pair) != 2:
            raise TensorMismatchError(f"{where} lacks lora_{'B' if 'A' in pair else 'A'}")
        wide, narrow = linear_widths(target, base)
        found = (*pair["A"].shape, *pair["B"].shape)
        if found != (pair["A"].shape[0], wide, narrow, pair["A"].shape[0]):
            raise TensorMismatchError(f"{where}: A and B are {found}, the base needs [R, {wide}] and [{narrow}, R]")
        linears[layer, target] = LowRank(pair["A"], pair["B"])
    return linears


def _module(place: tuple[int, Target]) -> str:
    return f"model.layers.{place[0]}.{linear_name(place[1])}"


def _check_complete(config: LoraConfig, linears: Linears, base: BaseRef) -> None:
    """Hold what the configuration targets against what there are tensors for."""
    everything = [(layer, target) for layer in range(base.num_layers) for target in TARGETS]
    if config.target_modules == "all-linear":
        wanted = set(everything)
    else:
        wanted = {place for place in everything if check_target_module_exists(config, _module(place))}
    names = () if isinstance(config.target_modules, str) else config.target_modules or ()
    for name in sorted(names):
        if not any(_module(place) == name or _module(place).endswith(f".{name}") for place in everything):
            raise InvalidInputError("target_modules", name, "is no linear that experts update")
    for place in sorted(wanted ^ linears.keys()):
        if place in wanted:
            raise TensorMismatchError(f"the adapter targets {_module(place)} and has no tensors for it")
        raise TensorMismatchError(f"the adapter has tensors for {_module(place)} and does not target it")
    if not linears:
        raise InvalidInputError("target_modules", config.target_modules, "matches no linear that experts update")


def _scaling(config: LoraConfig, place: tuple[int, Target], update: LowRank) -> float:
    module = _module(place)
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), module), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha)
    if rank != update.rank:
        raise TensorMismatchError(f"{module}: rank {update.rank}, the configuration says {rank}")
    if not (math.isfinite(alpha) and alpha > 0):
        raise InvalidInputError("lora_alpha", alpha, f"must be above 0 for {module}")
    return float(alpha / math.sqrt(rank) if config.use_rslora else alpha / rank)
