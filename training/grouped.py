"""Stage 2 of AT-MoE (arXiv 2410.10896): a grouped router per layer, trained while all experts stay frozen.

It does not know repertoires or how groups were named.
Read first: every layer has a router of its own; groups are skipped when serving only, so that every group has a
gradient here. With scope `request` a router reads the prompt's summary, which is known before training begins.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from runtime.errors import InvalidInputError, NonFiniteError
from runtime.model.attach import ExpertModule, MixtureFFN, attached, decoder_layers, mixture_layer
from runtime.model.base import BaseModel
from runtime.model.expert import Expert
from runtime.model.mixture import Router, weigh
from runtime.model.router_record import Grouping
from runtime.model.routers import grouped_router, router_tensor_name
from training.batches import Row, collate, shuffled_batches
from training.config import TrainingConfig
from training.features import features
from training.quick_attention import quick_attention
from training.seeds import seed_for
from training.steps import Progress, answer_loss, rate

_INIT = 0.02  # standard deviation: small enough that all groups, and all experts of one, begin alike (ours)

ExpertSets = Mapping[str, Mapping[int, Expert]]
"""Digest, or any other name, of an expert set -> its experts by layer; in the order of the router's columns."""


class GroupedRouting(nn.Module):
    """A layer's grouped router as parameters; called with tokens [T, D], it gives the weights [T, E] of the experts.

    Args:
        grouping: its parameters; `epsilon` is not used.
        labels: the group of each of the layer's visible experts.
        width: D.
        has_general: whether the general expert has this layer; it is the last column then.
        generator: of the start.

    With scope `request`, `summary` [B, D] must be set to what summarises the sequences of the batch.
    """

    def __init__(
        self,
        grouping: Grouping,
        labels: Sequence[str],
        width: int,
        *,
        has_general: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self._grouping, self._labels, self._has_general = grouping, tuple(labels), has_general
        num_groups = len(grouping.names())
        self.group_weight = nn.Parameter(torch.randn(num_groups, width, generator=generator) * _INIT)
        self.group_bias = nn.Parameter(torch.zeros(num_groups))
        shape = (len(labels), width) if grouping.within == "input" else (len(labels),)
        self.within = nn.Parameter(torch.randn(shape, generator=generator) * _INIT)
        self.summary: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, E]; T is a multiple of the number of summaries where there are such."""
        if self._grouping.scope == "request":
            assert self.summary is not None, "a router of whole prompts needs their summaries"
            x = self.summary.repeat_interleave(x.shape[0] // len(self.summary), dim=0)
        return weigh(self._router(), x, kind="grouped", top_k=len(self._labels))

    def _router(self) -> Router:
        is_static = self._grouping.within == "static"
        return grouped_router(
            self._grouping.model_copy(update={"epsilon": 0.0}),
            experts=self._labels,  # names of columns mean nothing here
            labels=self._labels,
            weight=self.within.new_zeros(len(self._labels), self.group_weight.shape[1]) if is_static else self.within,
            bias=self.within if is_static else None,
            group_weight=self.group_weight,
            group_bias=self.group_bias,
            general="general" if self._has_general else None,
        )

    def tensors(self, layer: int) -> dict[str, torch.Tensor]:
        """As a router blob holds them."""
        part = "weight" if self._grouping.within == "input" else "logits"
        parts = {part: self.within, "group.weight": self.group_weight, "group.bias": self.group_bias}
        return {router_tensor_name(layer, name): tensor.detach().cpu().clone() for name, tensor in parts.items()}


MakeRouting = Callable[[Sequence[str], bool, torch.Generator], nn.Module]
"""Groups of a layer's experts, whether the general one has it, where to begin -> weights of its experts."""


def frozen_mixture(
    base: BaseModel,
    sets: ExpertSets,
    groups: Mapping[str, str],
    general: Mapping[int, Expert],
    make: MakeRouting,
    *,
    seed: int,
) -> dict[int, MixtureFFN]:
    """Frozen experts under routings of their own, in every layer that an expert has; `base` is not changed.

    Args:
        base: gives layers and device.
        sets: the visible expert sets.
        groups: the group of each.
        general: layer -> the general expert; empty without one.
        make: makes a layer's routing.
        seed: of where they begin.
    """
    device, layers, ffns = base.model.device, decoder_layers(base.model), {}
    for layer in sorted({layer for experts in sets.values() for layer in experts}):
        members = {name: experts[layer] for name, experts in sets.items() if layer in experts}
        generator = torch.Generator().manual_seed(seed_for(seed, "routing", str(layer)))
        routing = make([groups[name] for name in members], layer in general, generator)
        experts = [*members.values(), *([general[layer]] if layer in general else [])]
        modules = [ExpertModule(expert, trainable=False).to(device) for expert in experts]
        nothing = torch.zeros(len(modules), base.info.width, device=device)
        ffns[layer] = mixture_layer(layers[layer], modules, nothing, top_k=len(modules), weigh=routing.to(device))
    return ffns


def train_routings(
    base: BaseModel,
    ffns: Mapping[int, MixtureFFN],
    rows: Sequence[Row],
    *,
    name: str,
    summaries: torch.Tensor | None,
    config: TrainingConfig,
    on_progress: Progress = lambda _step, _num_steps, _loss: None,
) -> tuple[float, ...]:
    """Train the routings of `ffns` in place; experts and base stay as they are.

    Args:
        base: frozen.
        ffns: as from `frozen_mixture`.
        rows: examples, at least one.
        name: of the task; enters the seed of their order.
        summaries: [N, D] of the rows' prompts, for routings of scope `request`.
        config: `router_learning_rate`, `batch_size`, steps, clipping and seed.
        on_progress: called after every step.

    Returns:
        the cross-entropy of every step, nats per answer token.

    Raises:
        InvalidInputError: nothing to train on.
        NonFiniteError: the loss became NaN or infinite.
    """
    if not rows:
        raise InvalidInputError("examples", [], f"task {name} has nothing to train on")
    routings = [ffn.weigh for ffn in ffns.values() if isinstance(ffn.weigh, nn.Module)]
    parameters = [parameter for routing in routings for parameter in routing.parameters()]
    num_steps = config.num_steps(len(rows))
    optimizer = torch.optim.AdamW(parameters, lr=config.router_learning_rate, weight_decay=config.weight_decay)
    warmup = max(1, round(config.warmup_share * num_steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, num_steps, warmup))
    order = random.Random(seed_for(config.seed, name, "order"))  # noqa: S311 - an order of examples is no secret
    place = {id(row): i for i, row in enumerate(rows)}
    losses: list[float] = []
    with attached(base.model, ffns), quick_attention(base):
        while len(losses) < num_steps:
            for batch_rows in shuffled_batches(rows, batch_size=config.batch_size, rng=order):
                if summaries is not None:
                    set_summaries(ffns, summaries[[place[id(row)] for row in batch_rows]].to(base.model.device))
                loss = answer_loss(base, collate(batch_rows, base.model.device))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(parameters, config.gradient_clip)
                optimizer.step()
                schedule.step()
                losses.append(float(loss.detach()))
                if not math.isfinite(losses[-1]):
                    raise NonFiniteError(f"task {name}: the loss is {losses[-1]}; a lower router rate may help")
                on_progress(len(losses), num_steps, losses[-1])
                if len(losses) == num_steps:
                    break
    return tuple(losses)


def set_summaries(ffns: Mapping[int, MixtureFFN], summaries: torch.Tensor) -> None:
    """Tell the routings of scope `request` what the next batch's prompts are: [B, D]."""
    for ffn in ffns.values():
        if isinstance(ffn.weigh, GroupedRouting):
            ffn.weigh.summary = summaries


def prompt_summaries(base: BaseModel, prompts: Sequence[Sequence[int]], first_layer: int) -> torch.Tensor:
    """What routers of scope `request` read, as `runtime.model.control.summary` gives it, of every prompt: [B, D]."""
    means = features(base, prompts, first_layer)
    return means / means.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)
