"""Train one task on top of what is there: new experts in some layers, and a new router in every layer that sees any.

It does not know repertoires, locators or how the layers were chosen: experts go in as tensors and come out as tensors.
Read first: only the new experts and routers have gradients; base and older experts are frozen, and older routers are
not even loaded, since an old router never sees a newer expert (LLaVA-CMoE, arXiv 2503.21227).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from runtime.errors import InvalidInputError
from runtime.model.attach import ExpertModule, MixtureFFN, attached
from runtime.model.base import BaseModel
from runtime.model.expert import Expert
from runtime.model.hyper_module import HyperNetwork
from training.batches import Row
from training.config import TrainingConfig
from training.hyper import attach_hyper
from training.loop import Surroundings, run_steps
from training.mixtures import fresh_experts, new_mixture
from training.quick_attention import quick_attention
from training.steps import Progress
from training.usage import Usage, router_usage


@dataclass(frozen=True)
class TrainedTask:
    """What training made.

    Args:
        experts: layer -> the new expert; not every layer need have one.
        routers: layer -> W [E, D] float32; in a layer with a new expert that is the last row.
        top_k: K, at most the largest number of visible experts in a layer.
        losses: cross-entropy of every step, nats per answer token.
        usage: layer -> share of its router's weight on each row of `routers`.
        hyper: the hypernetwork beside the experts; None where the configuration asks for none.
    """

    experts: Mapping[int, Expert]
    routers: Mapping[int, torch.Tensor]
    top_k: int
    losses: tuple[float, ...]
    usage: Usage
    hyper: HyperNetwork | None = None


def train_task(
    base: BaseModel,
    rows: Sequence[Row],
    older: Sequence[Mapping[int, Expert]],
    *,
    name: str,
    first_layer: int,
    config: TrainingConfig,
    new: Mapping[int, Expert] | None = None,
    around: Surroundings | None = None,
    on_progress: Progress = lambda _step, _num_steps, _loss: None,
) -> TrainedTask:
    """Train one task's experts and routers; `base` is as before afterwards. The loss is that of `training.steps.Steps`.

    Args:
        base: frozen; its dtype is the one that training computes in.
        rows: examples, at least one.
        older: the visible expert sets, in the order of their arrival, each layer -> expert.
        name: of the task; enters the seeds.
        first_layer: lowest layer that may get an expert.
        config: everything else.
        new: layer -> where its new expert begins; None gives every layer from `first_layer` on a fresh one.
        around: journal, checkpoints and other processes; None is none of them, and `on_progress`.
        on_progress: see `Progress`.

    Raises:
        InvalidInputError: no rows, or `first_layer` is not a layer of the base.
        TensorMismatchError: experts cannot be attached to this architecture.
        NonFiniteError: the loss became NaN or infinite.
    """
    check_trainable(base, rows, name=name, first_layer=first_layer)
    if new is None:
        new = fresh_experts(base, range(first_layer, base.info.num_layers), config, seed_name=name)
    ffns = new_mixture(base, older, new, name=name, first_layer=first_layer, config=config)
    if not ffns:  # nothing to choose from and nothing to train: the plain base
        return TrainedTask({}, {}, 1, (), {})
    hyper = attach_hyper(base, ffns, name=name, config=config)
    losses = train_mixture(base, ffns, rows, name=name, config=config, around=around, on_progress=on_progress)
    return TrainedTask(
        experts={layer: _newest(ffns[layer]).expert() for layer in sorted(new)},
        routers={layer: ffn.router.detach().cpu().clone() for layer, ffn in ffns.items()},
        top_k=max(ffn.top_k for ffn in ffns.values()),
        losses=losses,
        usage=router_usage(base, ffns, rows, batch_size=config.batch_size),
        hyper=hyper,
    )


def train_mixture(
    base: BaseModel,
    ffns: Mapping[int, MixtureFFN],
    rows: Sequence[Row],
    *,
    name: str,
    config: TrainingConfig,
    around: Surroundings | None = None,
    on_progress: Progress = lambda _step, _num_steps, _loss: None,
) -> tuple[float, ...]:
    """Train in place whatever asks for gradients in the mixtures `ffns`, layer -> FFN; the base stays as it is.

    The loss is that of `training.steps.Steps`; `name` enters the order of the examples and messages.

    Returns:
        cross-entropy of every step, nats per answer token.

    Raises:
        NonFiniteError: the loss became NaN or infinite.
    """
    if around is None:
        around = Surroundings(on_progress=on_progress)
    with attached(base.model, ffns), quick_attention(base):
        return run_steps(base, ffns, rows, name=name, config=config, around=around)


def check_trainable(base: BaseModel, rows: Sequence[Row], *, name: str, first_layer: int) -> None:
    """Check what no training can do without.

    Raises:
        InvalidInputError: no rows, or `first_layer` is not a layer of the base.
    """
    if not rows:
        raise InvalidInputError("examples", [], f"task {name} has nothing to train on")
    if first_layer >= base.info.num_layers:
        raise InvalidInputError("first_layer", first_layer, f"the base has {base.info.num_layers} layers")


def _newest(ffn: MixtureFFN) -> ExpertModule:
    newest = ffn.experts[-1]
    assert isinstance(newest, ExpertModule)
    return newest
