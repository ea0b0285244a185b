"""Hyper-adapters as modules beside an FFN: one that is trained, one that holds what a repertoire has.

It does not know data or losses.
Read first: both are called with the FFN's input x [T, D] and the chosen experts [T, E] bool, and give what is added to
the FFN's output, ungated (HyperMoE, arXiv 2402.12656). They are the `beside` of a `MixtureFFN`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from runtime.model.hyper import HyperSizes, fresh_hyper, generate
from runtime.model.hyper_sets import Hyper, distinct_sets


class HyperNetwork(nn.Module):
    """A trainable hypernetwork for all layers, float32.

    Args:
        sizes: see `HyperSizes`.
        generator: where the start comes from.
    """

    def __init__(self, sizes: HyperSizes, *, generator: torch.Generator) -> None:
        super().__init__()
        self.sizes = sizes
        for name, tensor in fresh_hyper(sizes, generator=generator).items():
            self.register_parameter(_attribute(name), nn.Parameter(tensor))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The parameters by the names of `hyper_shapes`."""
        return {name.replace("/", "."): parameter for name, parameter in self.named_parameters()}

    def weights(self) -> dict[str, torch.Tensor]:
        """Detached copies on the CPU, by the same names."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.tensors().items()}


class TrainedHyper(nn.Module):
    """The adapters of one layer, generated anew for the distinct sets of every pass, with gradients."""

    def __init__(self, network: HyperNetwork, layer: int) -> None:
        super().__init__()
        self.network = network
        self.layer = layer

    def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Of x [T, D] and chosen [T, E] bool: [T, D] float32."""
        sets, which = distinct_sets(chosen)
        return generate(self.network.tensors(), self.network.sizes, self.layer, sets).apply(x, which)


class HeldHyper(nn.Module):
    """The adapters of one layer of a task, as they are served."""

    def __init__(self, hyper: Hyper, layer: int) -> None:
        super().__init__()
        self.hyper = hyper
        self.layer = layer

    def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Of x [T, D] and chosen [T, E] bool: [T, D] float32."""
        return self.hyper.add(self.layer, x, chosen)


def hyper_linears(ffns: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The weights of all linears of the hypernetworks that are trained beside FFNs; embeddings and biases are none."""
    networks = {id(ffn.beside.network): ffn.beside.network for ffn in ffns if isinstance(ffn.beside, TrainedHyper)}
    return [
        parameter
        for network in networks.values()
        for name, parameter in network.named_parameters()
        if name.endswith(_attribute(".weight"))
    ]


def _attribute(name: str) -> str:
    return name.replace(".", "/")  # a parameter's name must hold no dot
