"""A mixture attached to a Hugging Face model: the FFN of a layer with its experts and its router, as one module.

It knows nothing of engines, caches or batches of several tasks; training and verification use it, on any causal LM
whose FFN has `gate_proj`, `up_proj`, `down_proj` and `act_fn`.
Read first: the router decides once per token and layer, and its weights apply inside each of the three linears.
`attached` is the way to run a model with a mixture; `load_mixture` makes one of what a repertoire holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from runtime.errors import TensorMismatchError
from runtime.kernels.routing import top_k_weights
from runtime.model.expert import Expert, LowRank
from runtime.model.generation import Generation
from runtime.model.manifest import TARGETS, BaseRef, Target
from runtime.model.repertoire import Repertoire


class ExpertModule(nn.Module):
    """One expert as parameters, float32: per target A [R, in] and B [out, R]."""

    def __init__(self, expert: Expert, *, trainable: bool) -> None:
        super().__init__()
        self.layer = expert.layer
        self.scale = expert.scale
        self.targets = tuple(target for target in TARGETS if target in expert.updates)
        self.a = nn.ParameterDict(
            {t: nn.Parameter(expert.updates[t].a.detach().float().clone(), trainable) for t in self.targets}
        )
        self.b = nn.ParameterDict(
            {t: nn.Parameter(expert.updates[t].b.detach().float().clone(), trainable) for t in self.targets}
        )

    def expert(self) -> Expert:
        """The expert as plain tensors, detached."""
        updates = {t: LowRank(self.a[t].detach().clone(), self.b[t].detach().clone()) for t in self.targets}
        return Expert(layer=self.layer, scale=self.scale, updates=updates)


def fresh_expert(layer: int, *, rank: int, alpha: float, base: BaseRef, generator: torch.Generator) -> Expert:
    """A new expert that changes nothing yet: A uniform in `+-1/sqrt(in)`, B zero, scale alpha/R (LoRA, as in PEFT)."""
    updates: dict[Target, LowRank] = {}
    for target in TARGETS:
        wide, narrow = (base.ffn_width, base.width) if target == "down" else (base.width, base.ffn_width)
        a = (torch.rand(rank, wide, generator=generator) * 2 - 1) / math.sqrt(wide)
        updates[target] = LowRank(a, torch.zeros(narrow, rank))
    return Expert(layer=layer, scale=alpha / rank, updates=updates)


class MixtureFFN(nn.Module):
    """An FFN with E visible experts and a top-k router.

    `w = top_k_weights(W x)`; each linear gives `W0 x + sum_e w_e * scale_e * B_e A_e x`; the FFN is
    `down(act(gate(x)) * up(x))` of these (LLaVA-CMoE: experts in the FFN; one decision per token and layer: ours).

    Args:
        ffn: the frozen FFN.
        experts: E visible experts.
        router: W [E, D] float32; a Parameter is trained.
        top_k: K.

    After a forward pass `logits` and `weights` ([T, E], of the last pass) are there for losses and reports.
    """

    def __init__(self, ffn: nn.Module, experts: Sequence[ExpertModule], router: torch.Tensor, *, top_k: int) -> None:
        super().__init__()
        for part in ("gate_proj", "up_proj", "down_proj", "act_fn"):
            if not hasattr(ffn, part):
                raise TensorMismatchError(f"{type(ffn).__name__} has no {part}: experts cannot be attached to it")
        if router.shape[0] != len(experts):
            raise TensorMismatchError(f"router has {router.shape[0]} rows for {len(experts)} experts")
        self.ffn = ffn
        self.experts = nn.ModuleList(experts)
        self.router = router if isinstance(router, nn.Parameter) else nn.Parameter(router, requires_grad=False)
        self.top_k = top_k
        self.logits: torch.Tensor
        self.weights: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        flat = x.reshape(-1, x.shape[-1])
        self.logits = flat.float() @ self.router.t()
        k = torch.full((flat.shape[0],), self.top_k, device=flat.device)
        allowed = torch.ones_like(self.logits, dtype=torch.bool)
        self.weights = top_k_weights(self.logits, allowed, k, self.top_k)
        hidden = self.ffn.act_fn(self._linear("gate", flat)) * self._linear("up", flat)  # type: ignore[operator]
        return self._linear("down", hidden).view_as(x)

    def _linear(self, target: Target, x: torch.Tensor) -> torch.Tensor:
        y = cast("torch.Tensor", getattr(self.ffn, f"{target}_proj")(x))
        modules = [cast("ExpertModule", module) for module in self.experts]
        members = [(e, module) for e, module in enumerate(modules) if target in module.targets]
        if not members:
            return y
        a = torch.cat([module.a[target] for _, module in members]).to(x.dtype)
        b = torch.cat([module.b[target].t() * module.scale for _, module in members]).to(x.dtype)
        owner = torch.repeat_interleave(
            torch.tensor([e for e, _ in members], device=x.device),
            torch.tensor([module.a[target].shape[0] for _, module in members], device=x.device),
        )
        return y + ((x @ a.t()).float() * self.weights[:, owner]).to(x.dtype) @ b


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers of a Hugging Face causal LM.

    Raises:
        TensorMismatchError: the model has no `model.layers` with an `mlp` each.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not all(hasattr(layer, "mlp") for layer in layers):
        raise TensorMismatchError(f"{type(model).__name__} has no model.layers[i].mlp to attach experts to")
    return layers


@contextmanager
def attached(model: nn.Module, ffns: Mapping[int, MixtureFFN]) -> Iterator[None]:
    """`model` with the mixtures in the place of its FFNs, and bit for bit the old one again on leaving."""
    layers = decoder_layers(model)
    for layer, mixture in ffns.items():
        layers[layer].mlp = mixture
    try:
        yield
    finally:
        for layer, mixture in ffns.items():
            layers[layer].mlp = mixture.ffn


def load_mixture(repertoire: Repertoire, generation: Generation, task: str, model: nn.Module) -> dict[int, MixtureFFN]:
    """Read router and experts of a task, frozen, as FFNs around those of `model`; `model` itself is not changed.

    Raises:
        UnknownTaskError: no such task.
        RepertoireError: something of the task cannot be read.
    """
    mixture = generation.mixture(task)
    base = generation.manifest.base
    device = next(model.parameters()).device
    modules = {
        (entry.digest, unit.layer): ExpertModule(repertoire.read_unit(entry, unit, base), trainable=False).to(device)
        for entry, unit in generation.visible_units(mixture)
    }
    layers = decoder_layers(model)
    return {
        layer: MixtureFFN(
            layers[layer].mlp,  # type: ignore[arg-type]
            [modules[digest, layer] for digest in router.experts],
            router.weight.to(device),
            top_k=mixture.top_k,
        )
        for layer, router in mixture.routers.items()
    }
