"""Plain adapters beside an FFN, without a hypernetwork: what HyperMoE is compared with at the same parameters.

They do not know hypernetworks.
Read first: `static` is one adapter per layer for every token; `free` is one per expert and layer, and a token gets the
sum of those of its chosen experts. Both start by adding nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from runtime.model.attach import MixtureFFN
from runtime.model.hyper import HyperExperts


class AdaptersBeside(nn.Module):
    """S adapters `relu(x D + d) U + u` of one layer; with S = 1 it serves all tokens, else the s-th the s-th expert.

    Args:
        num: S.
        width: D.
        bottleneck: b.
        generator: where the start comes from.
    """

    def __init__(self, num: int, width: int, bottleneck: int, *, generator: torch.Generator) -> None:
        super().__init__()
        self.num = num
        self.down = nn.Parameter(torch.randn(num, width, bottleneck, generator=generator) * width**-0.5)
        self.down_bias = nn.Parameter(torch.zeros(num, bottleneck))
        self.up = nn.Parameter(torch.zeros(num, bottleneck, width))
        self.up_bias = nn.Parameter(torch.zeros(num, width))

    def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Of x [T, D] and chosen [T, E] bool: [T, D] float32."""
        adapters = HyperExperts(self.down, self.down_bias, self.up, self.up_bias)
        if self.num == 1:
            return adapters.apply(x, torch.zeros(len(x), dtype=torch.int64, device=x.device))
        token, expert = chosen.nonzero(as_tuple=True)
        return torch.zeros(x.shape, device=x.device).index_add(0, token, adapters.apply(x[token], expert))


def fitting_bottleneck(parameters: int, *, num: int, num_layers: int, width: int) -> int:
    """The bottleneck b with which `num` adapters in each layer have about `parameters` in all; at least 1.

    S L (b (2 D + 1) + D) = parameters
    """
    return max(1, round((parameters / (num * num_layers) - width) / (2 * width + 1)))


def attach_adapters(
    ffns: Mapping[int, MixtureFFN], *, per_expert: bool, parameters: int, width: int, generator: torch.Generator
) -> int:
    """Put adapters beside `ffns` that have about `parameters` in all; returns how many they have."""
    most = max(len(ffn.experts) for ffn in ffns.values()) if per_expert else 1
    bottleneck = fitting_bottleneck(parameters, num=most, num_layers=len(ffns), width=width)
    total = 0
    for ffn in ffns.values():
        num = len(ffn.experts) if per_expert else 1
        ffn.beside = AdaptersBeside(num, width, bottleneck, generator=generator).to(ffn.router.device)
        total += sum(parameter.numel() for parameter in ffn.beside.parameters())
    return total
