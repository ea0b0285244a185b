"""A mixture attached to a Hugging Face model: a layer's FFN and attention with its experts and its router, as modules.

It knows nothing of engines, caches or batches of several tasks; training and verification use it, on any causal LM
whose linears `runtime.model.layer_names` knows.
Read first: the router decides once per token for the FFN and, where there are experts for it, once for the attention,
from the input of each; its weights apply inside every linear of the block.
`attached` is the way to run a model with a mixture; `load_mixture` makes one of what a repertoire holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from runtime.errors import InvalidInputError, TensorMismatchError
from runtime.kernels.routing import top_k_weights
from runtime.model.expert import Expert, LowRank, linear_widths
from runtime.model.generation import Generation
from runtime.model.hyper_module import HeldHyper
from runtime.model.layer_names import attention_linears, attention_name, ffn_linears, layer_names, split_output
from runtime.model.manifest import ATTENTION_TARGETS, TARGETS, BaseRef, Target
from runtime.model.mixture import Mixture, Router, weigh
from runtime.model.repertoire import Repertoire

Weigh = Callable[[torch.Tensor], torch.Tensor]
"""Tokens [T, D] -> weights of the experts [T, E] float32."""


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


def linear_name(target: Target) -> str:
    """Name of a linear within a decoder layer of the Llama family in `transformers`."""
    return f"self_attn.{target}_proj" if target in ATTENTION_TARGETS else f"mlp.{target}_proj"


def fresh_expert(
    layer: int,
    *,
    rank: int,
    alpha: float,
    base: BaseRef,
    generator: torch.Generator,
    targets: Sequence[Target] | None = None,
) -> Expert:
    """A new expert that changes nothing yet: A uniform in `+-1/sqrt(in)`, B zero, scale alpha/R (LoRA, as in PEFT).

    `targets` are those of the base's FFN by default.
    """
    updates: dict[Target, LowRank] = {}
    for target in layer_names(base.architecture).ffn_targets if targets is None else targets:
        wide, narrow = linear_widths(target, base)
        a = (torch.rand(rank, wide, generator=generator) * 2 - 1) / math.sqrt(wide)
        updates[target] = LowRank(a, torch.zeros(narrow, rank))
    return Expert(layer=layer, scale=alpha / rank, updates=updates)


class MixtureFFN(nn.Module):
    """An FFN with E visible experts and a router.

    `w = top_k_weights(W x)`; each linear gives `W0 x + sum_e w_e * scale_e * B_e A_e x`; the FFN makes of these what
    it makes of its own, as `down(act(gate(x)) * up(x))` (LLaVA-CMoE: experts in the FFN; one decision per token and
    layer: ours).

    Args:
        ffn: the frozen FFN.
        experts: E visible experts.
        router: W [E, D] float32; a Parameter is trained.
        top_k: K.
        weigh: another way to weights than `top_k_weights(W x)`; `router` is then of no use, and `logits` is not set.

    After a forward pass `logits` and `weights` ([T, E], of the last pass) are there for losses and reports.
    """

    attention: MixtureAttention | None = None
    """The attention of the same layer where experts update it; see `mixture_layer`."""

    def __init__(
        self,
        ffn: nn.Module,
        experts: Sequence[ExpertModule],
        router: torch.Tensor,
        *,
        top_k: int,
        weigh: Weigh | None = None,
    ) -> None:
        super().__init__()
        self._linears = ffn_linears(ffn)
        if router.shape[0] != len(experts):
            raise TensorMismatchError(f"router has {router.shape[0]} rows for {len(experts)} experts")
        self.ffn = ffn
        self.experts = nn.ModuleList(experts)
        self.router = router if isinstance(router, nn.Parameter) else nn.Parameter(router, requires_grad=False)
        self.top_k = top_k
        self.weigh = weigh
        self.beside: nn.Module | None = None  # of x [T, D] and the chosen experts [T, E]; added to the FFN's output
        self.logits: torch.Tensor
        self.weights: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        flat = x.reshape(-1, x.shape[-1])
        self.weights = self.route(flat)
        with _updating(self, self.ffn, self._linears, self.weights):
            y = cast("torch.Tensor", self.ffn(flat))
        if self.beside is not None:
            y = y + self.beside(flat, self.weights > 0).to(y.dtype)
        return y.view_as(x)

    def route(self, flat: torch.Tensor) -> torch.Tensor:
        """Weights [T, E] for the inputs [T, D] of the block; sets `logits` where the router is top-k."""
        if self.weigh is not None:
            return self.weigh(flat)
        self.logits = flat.float() @ self.router.t()
        k = torch.full((flat.shape[0],), self.top_k, device=flat.device)
        allowed = torch.ones_like(self.logits, dtype=torch.bool)
        weights = top_k_weights(self.logits, allowed, k, self.top_k)
        if self.top_k == 1 and self.router.requires_grad:
            # A single choice weighs 1 whatever its logit, so its router would learn nothing. It gets the gradient that
            # its probability would have (as in Switch Transformers); the value stays 1 to the bit (ours).
            shares = torch.softmax(self.logits, dim=1)
            weights = weights + (shares - shares.detach()) * (weights > 0)
        return weights

    def updated(self, target: Target, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`y + sum_e weights_e * scale_e * B_e A_e x`: x [T, in], y [T, out]."""
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
        return y + ((x @ a.t()).float() * weights[:, owner]).to(x.dtype) @ b


class MixtureAttention(nn.Module):
    """An attention whose linears carry the updates of a mixture's experts; router and experts are those of its FFN.

    `w = route(x)` of the attention's own input x, which `q`, `k` and `v` read; `o` gets the same weights (ours).
    After a forward pass `weights` ([T, E]) is there for reports.
    """

    def __init__(self, attention: nn.Module, mixture: MixtureFFN, targets: Sequence[Target]) -> None:
        super().__init__()
        self._linears = attention_linears(attention, targets)
        self.attention = attention
        self._mixture = (mixture,)  # in a tuple: not a part of this module, which is a part of that one's layer
        self.weights: torch.Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever the attention takes and gives
        """As the attention's own, with the experts' updates."""
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.weights = self._mixture[0].route(x.reshape(-1, x.shape[-1]))
        with _updating(self._mixture[0], self.attention, self._linears, self.weights):
            return self.attention(*args, **kwargs)


@contextmanager
def _updating(
    mixture: MixtureFFN, block: nn.Module, linears: Mapping[str, tuple[Target, ...]], weights: torch.Tensor
) -> Iterator[None]:
    """`block` with the experts' updates in its `linears` (name -> targets in its output), by hooks."""

    def update(
        targets: Sequence[Target], _linear: nn.Module, inputs: tuple[torch.Tensor, ...], y: torch.Tensor
    ) -> torch.Tensor:
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        parts = split_output(y.reshape(-1, y.shape[-1]), targets, getattr(block, "config", None))
        updated = [mixture.updated(target, x, part, weights) for target, part in zip(targets, parts, strict=True)]
        return (updated[0] if len(updated) == 1 else torch.cat(updated, dim=1)).view_as(y)

    handles = [getattr(block, name).register_forward_hook(partial(update, linears[name])) for name in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def mixture_layer(
    layer: nn.Module, experts: Sequence[ExpertModule], router: torch.Tensor, *, top_k: int, weigh: Weigh | None = None
) -> MixtureFFN:
    """A decoder layer's FFN, and its attention if experts update it, with a mixture; arguments as in `MixtureFFN`."""
    ffn = MixtureFFN(layer.mlp, experts, router, top_k=top_k, weigh=weigh)  # type: ignore[arg-type]
    targets = [t for t in ATTENTION_TARGETS if any(t in expert.targets for expert in experts)]
    if targets:
        # Not registered as a part: it holds modules of the layer beside the FFN.
        object.__setattr__(ffn, "attention", MixtureAttention(getattr(layer, attention_name(layer)), ffn, targets))
    return ffn


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers of a Hugging Face causal LM.

    Raises:
        TensorMismatchError: the model has no list of layers with an `mlp` each.
    """
    names = layer_names(type(model).__name__)
    layers = getattr(getattr(model, "base_model", None), names.layers, None)
    if not isinstance(layers, nn.ModuleList) or not all(hasattr(layer, names.ffn) for layer in layers):
        raise TensorMismatchError(f"{type(model).__name__} has no model.layers[i].mlp to attach experts to")
    return layers


@contextmanager
def attached(model: nn.Module, ffns: Mapping[int, MixtureFFN]) -> Iterator[None]:
    """`model` with the mixtures in its layers, and bit for bit the old one again on leaving."""
    layers = decoder_layers(model)
    for layer, mixture in ffns.items():
        layers[layer].mlp = mixture
        if mixture.attention is not None:
            setattr(layers[layer], attention_name(layers[layer]), mixture.attention)
    try:
        yield
    finally:
        for layer, mixture in ffns.items():
            layers[layer].mlp = mixture.ffn
            if mixture.attention is not None:
                setattr(layers[layer], attention_name(layers[layer]), mixture.attention.attention)


def load_mixture(repertoire: Repertoire, generation: Generation, task: str, model: nn.Module) -> dict[int, MixtureFFN]:
    """Read router and experts of a task, frozen, as FFNs around those of `model`; `model` itself is not changed.

    Raises:
        UnknownTaskError: no such task.
        RepertoireError: something of the task cannot be read.
        InvalidInputError: its weights are fixed per request; see `hold_mixture`.
    """
    return hold_mixture(repertoire, generation, generation.mixture(task), model)


def hold_mixture(
    repertoire: Repertoire, generation: Generation, mixture: Mixture, model: nn.Module
) -> dict[int, MixtureFFN]:
    """`load_mixture` for what `runtime.model.control` made of a task's mixture.

    Raises:
        RepertoireError: an expert cannot be read.
        InvalidInputError: its weights are fixed per request, and have not been.
    """
    if mixture.by_request:
        raise InvalidInputError("task", mixture.task, "its router weighs whole prompts: fix its weights for one first")
    base = generation.manifest.base
    device = next(model.parameters()).device
    modules = {
        (entry.digest, unit.layer): ExpertModule(repertoire.read_unit(entry, unit, base), trainable=False).to(device)
        for entry, unit in generation.visible_units(mixture)
    }
    layers = decoder_layers(model)
    ffns = {
        layer: mixture_layer(
            layers[layer],
            [modules[digest, layer] for digest in router.experts],
            router.weight.to(device),
            top_k=mixture.top_k,
            weigh=None if mixture.kind == "top_k" else partial(_weigh, router, mixture),
        )
        for layer, router in mixture.routers.items()
    }
    for layer, ffn in ffns.items() if mixture.hyper else ():
        ffn.beside = HeldHyper(mixture.hyper, layer)  # type: ignore[arg-type]
    return ffns


def _weigh(router: Router, mixture: Mixture, x: torch.Tensor) -> torch.Tensor:
    return weigh(router, x.to(router.weight.device), kind=mixture.kind, top_k=mixture.top_k).to(x.device)
