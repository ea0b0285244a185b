"""Which module of a decoder layer computes which linear: the names that experts' targets have in each architecture.

It knows nothing of experts, routers or weights.
Read first: most causal LMs name their linears as Llama does; those that do not are listed here by their class name. An
architecture may lack a target (GPT-2 has no gate), and one module may compute several, their outputs side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from runtime.errors import TensorMismatchError
from runtime.model.manifest import FFN_TARGETS, TARGETS, Target


@dataclass(frozen=True, kw_only=True)
class LayerNames:
    """Names of one architecture.

    Args:
        layers: the list of decoder layers within the model without its head.
        attention: of a layer.
        ffn: of a layer.
        linears: name within attention or FFN, as "mlp.up_proj" -> the targets in its output, one after the other.
    """

    layers: str = "layers"
    attention: str = "self_attn"
    ffn: str = "mlp"
    linears: Mapping[str, tuple[Target, ...]]

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        """What an expert may update, in the order of `TARGETS`."""
        return tuple(target for target in TARGETS if any(target in found for found in self.linears.values()))

    @cached_property
    def ffn_targets(self) -> tuple[Target, ...]:
        """Those of them in the FFN."""
        return tuple(target for target in self.targets if target in FFN_TARGETS)

    def within(self, block: str) -> dict[str, tuple[Target, ...]]:
        """The linears of `attention` or of `ffn`, by their names in that block."""
        prefix = f"{block}."
        return {name.removeprefix(prefix): found for name, found in self.linears.items() if name.startswith(prefix)}


_LLAMA = LayerNames(
    linears=MappingProxyType(
        {
            "self_attn.q_proj": ("q",),
            "self_attn.k_proj": ("k",),
            "self_attn.v_proj": ("v",),
            "self_attn.o_proj": ("o",),
            "mlp.gate_proj": ("gate",),
            "mlp.up_proj": ("up",),
            "mlp.down_proj": ("down",),
        }
    )
)
_GPT2 = LayerNames(
    layers="h",
    attention="attn",
    linears=MappingProxyType(
        {"attn.c_attn": ("q", "k", "v"), "attn.c_proj": ("o",), "mlp.c_fc": ("up",), "mlp.c_proj": ("down",)}
    ),
)
_GPT_NEOX = LayerNames(  # its queries, keys and values lie head by head, so no expert updates them
    attention="attention",
    linears=MappingProxyType({"attention.dense": ("o",), "mlp.dense_h_to_4h": ("up",), "mlp.dense_4h_to_h": ("down",)}),
)
_PHI = LayerNames(
    linears=MappingProxyType(
        {
            "self_attn.q_proj": ("q",),
            "self_attn.k_proj": ("k",),
            "self_attn.v_proj": ("v",),
            "self_attn.dense": ("o",),
            "mlp.fc1": ("up",),
            "mlp.fc2": ("down",),
        }
    )
)
_STARCODER2 = LayerNames(
    linears=MappingProxyType(
        {
            "self_attn.q_proj": ("q",),
            "self_attn.k_proj": ("k",),
            "self_attn.v_proj": ("v",),
            "self_attn.o_proj": ("o",),
            "mlp.c_fc": ("up",),
            "mlp.c_proj": ("down",),
        }
    )
)
_PHI3 = LayerNames(
    linears=MappingProxyType(
        {
            "self_attn.qkv_proj": ("q", "k", "v"),
            "self_attn.o_proj": ("o",),
            "mlp.gate_up_proj": ("gate", "up"),
            "mlp.down_proj": ("down",),
        }
    )
)
_NAMES: Mapping[str, LayerNames] = MappingProxyType(
    {
        "GPT2LMHeadModel": _GPT2,
        "GPTNeoXForCausalLM": _GPT_NEOX,
        "PhiForCausalLM": _PHI,
        "Phi3ForCausalLM": _PHI3,
        "Starcoder2ForCausalLM": _STARCODER2,
    }
)


def layer_names(architecture: str) -> LayerNames:
    """The names of an architecture, given as its class in `transformers`; those of Llama where it has no own."""
    return _NAMES.get(architecture, _LLAMA)


def is_named_as_llama(architecture: str) -> bool:
    """Whether an architecture's linears are those of Llama, one module each."""
    return layer_names(architecture) is _LLAMA


def ffn_linears(ffn: nn.Module) -> dict[str, tuple[Target, ...]]:
    """The linears of an FFN by their names in it, whichever architecture it is of.

    Raises:
        TensorMismatchError: no known architecture names them so.
    """
    for names in (_LLAMA, *_NAMES.values()):
        found = names.within(names.ffn)
        if all(hasattr(ffn, name) for name in found):
            return found
    missing = next(name for name in _LLAMA.within("mlp") if not hasattr(ffn, name))
    raise TensorMismatchError(f"{type(ffn).__name__} has no {missing}: experts cannot be attached to it")


def attention_linears(attention: nn.Module, targets: Sequence[Target]) -> dict[str, tuple[Target, ...]]:
    """The linears of an attention by their names in it.

    Raises:
        TensorMismatchError: no known architecture names them so, or this one has none for one of `targets`.
    """
    known = [names.within(names.attention) for names in (_LLAMA, *_NAMES.values())]
    found = max((each for each in known if all(hasattr(attention, name) for name in each)), key=len, default={})
    missing = [target for target in targets if not any(target in each for each in found.values())]
    if missing:
        raise TensorMismatchError(f"{type(attention).__name__} has no {missing[0]} to attach experts to")
    return found


def attention_name(layer: nn.Module) -> str:
    """What a decoder layer calls its attention.

    Raises:
        TensorMismatchError: none of the known names.
    """
    for names in (_LLAMA, *_NAMES.values()):
        if hasattr(layer, names.attention):
            return names.attention
    raise TensorMismatchError(f"{type(layer).__name__} has no attention to attach experts to")


def split_output(y: torch.Tensor, targets: Sequence[Target], config: Any) -> tuple[torch.Tensor, ...]:  # noqa: ANN401
    """Views of the targets' parts of a linear's output [T, H]: queries, keys and values by heads, all else evenly.

    Args:
        y: [T, H].
        targets: that it holds, one after the other.
        config: of the model, for the numbers of heads; not read where there is one target.
    """
    if len(targets) == 1:
        return (y,)
    heads = int(config.num_attention_heads) if "q" in targets else 1
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads) if "q" in targets else 1
    parts = [kv_heads if target in ("k", "v") else heads for target in targets]
    unit = y.shape[1] // sum(parts)
    return tuple(y.narrow(1, unit * sum(parts[:i]), unit * part) for i, part in enumerate(parts))
