"""Train one task on top of what is there: one new expert and one new router in every layer from `first_layer` on.

It does not know repertoires or locators: experts go in as tensors and come out as tensors.
Read first: only the new experts and routers have gradients; base and older experts are frozen, and older routers are
not even loaded, since an old router never sees a newer expert (LLaVA-CMoE, arXiv 2503.21227).
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from runtime.errors import InvalidInputError, NonFiniteError
from runtime.kernels.routing import balance_loss
from runtime.model.attach import ExpertModule, MixtureFFN, attached, decoder_layers, fresh_expert
from runtime.model.base import BaseModel
from runtime.model.expert import Expert
from runtime.model.generation import base_ref
from training.batches import Batch, Row, collate, shuffled_batches
from training.config import TrainingConfig

_ROUTER_INIT = 0.02  # standard deviation: small enough that every expert begins with a like weight (ours)

Progress = Callable[[int, int, float], None]
"""Called after every step with (steps done, steps in all, cross-entropy of this step in nats per token)."""


@dataclass(frozen=True)
class TrainedTask:
    """What training made.

    Args:
        experts: layer -> the new expert.
        routers: layer -> W [E, D] float32; the new expert is the last row.
        top_k: K, at most the number of visible experts.
        losses: cross-entropy of every step, nats per answer token.
    """

    experts: Mapping[int, Expert]
    routers: Mapping[int, torch.Tensor]
    top_k: int
    losses: tuple[float, ...]


def seed_for(seed: int, *purpose: str) -> int:
    """A seed of its own for every purpose (task, part), so that equal seeds do not mean equal weights everywhere."""
    return int.from_bytes(hashlib.sha256("\0".join((str(seed), *purpose)).encode()).digest()[:6], "little")


def train_task(
    base: BaseModel,
    rows: Sequence[Row],
    older: Sequence[Mapping[int, Expert]],
    *,
    name: str,
    first_layer: int,
    config: TrainingConfig,
    on_progress: Progress = lambda _step, _num_steps, _loss: None,
) -> TrainedTask:
    """Train one task's experts and routers; `base` is as before afterwards.

        loss = mean over answer and end tokens of cross-entropy + lambda * mean over layers of the balancing loss

    Args:
        base: frozen; its dtype is the one that training computes in.
        rows: examples, at least one.
        older: the visible expert sets, in the order of their arrival, each layer -> expert.
        name: of the task; enters the seeds.
        first_layer: lowest layer that gets an expert.
        config: everything else.
        on_progress: see `Progress`.

    Raises:
        InvalidInputError: no rows, or `first_layer` is not a layer of the base.
        TensorMismatchError: experts cannot be attached to this architecture.
        NonFiniteError: the loss became NaN or infinite.
    """
    if not rows:
        raise InvalidInputError("examples", [], f"task {name} has nothing to train on")
    if first_layer >= base.info.num_layers:
        raise InvalidInputError("first_layer", first_layer, f"the base has {base.info.num_layers} layers")
    ffns = _new_mixture(base, older, name=name, first_layer=first_layer, config=config)
    losses = train_mixture(base, ffns, rows, name=name, config=config, on_progress=on_progress)
    return TrainedTask(
        experts={layer: _new_expert(ffn).expert() for layer, ffn in ffns.items()},
        routers={layer: ffn.router.detach().cpu().clone() for layer, ffn in ffns.items()},
        top_k=min(config.top_k, len(older) + 1),
        losses=losses,
    )


def train_mixture(
    base: BaseModel,
    ffns: Mapping[int, MixtureFFN],
    rows: Sequence[Row],
    *,
    name: str,
    config: TrainingConfig,
    on_progress: Progress = lambda _step, _num_steps, _loss: None,
) -> tuple[float, ...]:
    """Train in place whatever asks for gradients in the mixtures `ffns`, layer -> FFN; the base stays as it is.

    The loss is that of `train_task`; `name` enters the order of the examples and messages.

    Returns:
        cross-entropy of every step, nats per answer token.

    Raises:
        NonFiniteError: the loss became NaN or infinite.
    """
    with attached(base.model, ffns), _quick_attention(base):
        return tuple(_steps(base, ffns, rows, name=name, config=config, on_progress=on_progress))


def _new_mixture(
    base: BaseModel, older: Sequence[Mapping[int, Expert]], *, name: str, first_layer: int, config: TrainingConfig
) -> dict[int, MixtureFFN]:
    ref, device, layers = base_ref(base.info), base.model.device, decoder_layers(base.model)
    generator = torch.Generator().manual_seed(seed_for(config.seed, name, "experts"))
    ffns = {}
    for layer in range(first_layer, base.info.num_layers):
        frozen = [ExpertModule(experts[layer], trainable=False) for experts in older if layer in experts]
        fresh = fresh_expert(layer, rank=config.rank, alpha=config.alpha, base=ref, generator=generator)
        modules = [*frozen, ExpertModule(fresh, trainable=True)]
        router = torch.randn(len(modules), base.info.width, generator=generator) * _ROUTER_INIT
        ffns[layer] = MixtureFFN(
            layers[layer].mlp,  # type: ignore[arg-type]
            [module.to(device) for module in modules],
            nn.Parameter(router.to(device)),
            top_k=min(config.top_k, len(modules)),
        )
    return ffns


def _new_expert(ffn: MixtureFFN) -> ExpertModule:
    newest = ffn.experts[-1]
    assert isinstance(newest, ExpertModule)
    return newest


def _steps(
    base: BaseModel,
    ffns: Mapping[int, MixtureFFN],
    rows: Sequence[Row],
    *,
    name: str,
    config: TrainingConfig,
    on_progress: Progress,
) -> Iterator[float]:
    experts = [part for ffn in ffns.values() for part in ffn.experts.parameters() if part.requires_grad]
    routers = [ffn.router for ffn in ffns.values()]
    optimizer = torch.optim.AdamW(
        [
            {"params": experts, "lr": config.learning_rate},
            {"params": routers, "lr": config.router_learning_rate},
        ],
        weight_decay=config.weight_decay,
    )
    num_steps = config.num_steps(len(rows))
    warmup = max(1, round(config.warmup_share * num_steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, num_steps, warmup))
    rng = random.Random(seed_for(config.seed, name, "order"))  # noqa: S311 - an order of examples is no secret
    for step, batch in enumerate(_endless(rows, config.batch_size, rng, base.model.device), start=1):
        loss = answer_loss(base, batch)
        penalty = torch.stack([_balance(ffn, batch) for ffn in ffns.values()]).mean()
        optimizer.zero_grad()
        (loss + config.balance_coefficient * penalty).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([*experts, *routers], config.gradient_clip)
        optimizer.step()
        schedule.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteError(f"task {name}: the loss is {value} at step {step}; a lower learning_rate may help")
        on_progress(step, num_steps, value)
        yield value
        if step == num_steps:
            return


def answer_loss(base: BaseModel, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the tokens of `batch.targets`, in nats; a scalar with a graph where gradients are on."""
    hidden = base.model.model(input_ids=batch.ids, use_cache=False).last_hidden_state  # [B, T, D]
    # Gathered to [n, D] first: a strided 3-D input makes the head copy the whole vocabulary matrix per row.
    logits = base.model.get_output_embeddings()(hidden[batch.predicts])  # [n, V]
    return cross_entropy(logits.float(), batch.targets)


def rate(step: int, num_steps: int, warmup: int) -> float:
    """Share of the peak rate at `step` from 0: rises linearly to 1 over `warmup` steps, then falls as half a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def _balance(ffn: MixtureFFN, batch: Batch) -> torch.Tensor:
    real = batch.real.flatten()
    return balance_loss(ffn.logits[real], ffn.weights[real])


def _endless(rows: Sequence[Row], batch_size: int, rng: random.Random, device: torch.device) -> Iterator[Batch]:
    while True:
        for batch in shuffled_batches(rows, batch_size=batch_size, rng=rng):
            yield collate(batch, device)


@contextmanager
def _quick_attention(base: BaseModel) -> Iterator[None]:
    """On a CPU, plain attention inside: the backward pass of the fused one is slower at the length of our examples."""
    before = base.model.config._attn_implementation  # noqa: SLF001 - transformers has no public reader
    if base.model.device.type == "cpu":
        base.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.model.set_attn_implementation(before)
