"""Features of prompts for the locator: the frozen base's residual stream at a layer, pooled, in parts or of one token.

It does not know tasks, densities or experts.
Read first: the layers from `layer` on are never run, and a prompt's feature does not depend on the batch it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

from runtime.model.attach import decoder_layers
from runtime.model.base import BaseModel
from runtime.model.locator import num_parts, parts, pool
from runtime.model.manifest import Feature

_BATCH_SIZE = 32


_FEATURES: Mapping[Feature, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = MappingProxyType(
    {
        "residual_mean": lambda residual, _: pool(residual),
        "residual_last": lambda residual, _: residual[-1].float(),
        "residual_parts": parts,
    }
)


class _Reached(Exception):  # noqa: N818 - it ends a forward pass, it reports nothing wrong
    def __init__(self, residual: torch.Tensor) -> None:
        super().__init__()
        self.residual = residual


def _stop(_layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    raise _Reached(inputs[0])


def _stop_after(
    _layer: nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor | tuple[torch.Tensor]
) -> None:
    raise _Reached(output[0] if isinstance(output, tuple) else output)


@torch.no_grad()
def features(
    base: BaseModel,
    prompts: Sequence[Sequence[int]],
    layer: int,
    *,
    kind: Feature = "residual_mean",
    batch_size: int = _BATCH_SIZE,
) -> torch.Tensor:
    """`pool` or `parts` of the residual stream that enters `layer`, of every prompt; or its value at the last token.

    Prompts of similar length run together, padded on the right, where causal attention never looks.

    Args:
        base: without a mixture below `layer`.
        prompts: token ids of whole prompts as serving sends them, none empty.
        layer: a decoder layer; 0 is entered by the token embeddings, and L is what leaves the last layer.
        kind: the mean over the prompt, parts of it (both ours), or the last token's (paper, at L).
        batch_size: prompts per forward pass.

    Returns:
        [B, D] float32 on the CPU, in the order of `prompts`; of parts [B, 3 D].
    """
    found = torch.zeros(len(prompts), num_parts(kind) * base.info.width)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        some = [prompts[i] for i in chosen]
        residual = _residual(base, some, layer)
        embedded = _residual(base, some, 0) if kind == "residual_parts" else residual
        for row, words, i in zip(residual, embedded, chosen, strict=True):
            num = len(prompts[i])
            found[i] = _FEATURES[kind](row[:num], words[:num]).cpu()
    return found


def _residual(base: BaseModel, prompts: Sequence[Sequence[int]], layer: int) -> torch.Tensor:
    """The residual stream entering `layer`, [B, T, D]; meaningless at the padding."""
    ids = torch.zeros(len(prompts), max(len(prompt) for prompt in prompts), dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        ids[i, : len(prompt)] = torch.tensor(prompt)
    layers = decoder_layers(base.model)
    after = layer == len(layers)
    hook = layers[-1].register_forward_hook(_stop_after) if after else layers[layer].register_forward_pre_hook(_stop)
    try:
        base.model.base_model(input_ids=ids.to(base.model.device), use_cache=False)
    except _Reached as reached:
        return reached.residual
    finally:
        hook.remove()
    raise AssertionError(f"layer {layer} was never reached")
