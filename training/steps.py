"""The optimiser loop: cross-entropy of the answers plus the balancing loss, over experts and routers.

It does not know which experts are old, new or probes: what has gradients is trained.
Read first: one step is one batch of `batch_size` examples, computed in `accumulation` pieces; a piece counts by its
answer tokens, so the gradient is that of the whole batch whatever the number of pieces.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from runtime.errors import NonFiniteError
from runtime.kernels.routing import balance_loss
from runtime.model.attach import MixtureFFN
from runtime.model.base import BaseModel
from training.batches import Batch, Row, collate, shuffled_batches
from training.config import TrainingConfig

Progress = Callable[[int, int, float], None]
"""Called after every step with (steps done, steps in all, cross-entropy of this step in nats per token)."""


class Steps:
    """Trains what has gradients in `ffns`, one batch at a time.

        loss = mean over answer and end tokens of cross-entropy + lambda * mean over layers of the balancing loss

    Args:
        base: with `ffns` attached while `step` runs.
        ffns: layer -> mixture; their trainable parameters are trained, routers at a rate of their own.
        rows: examples, at least one.
        name: for messages.
        config: rates, sizes, clipping.
        num_steps: over which the rate rises and falls.
        order_seed: of the order of examples.
    """

    def __init__(
        self,
        base: BaseModel,
        ffns: Mapping[int, MixtureFFN],
        rows: Sequence[Row],
        *,
        name: str,
        config: TrainingConfig,
        num_steps: int,
        order_seed: int,
    ) -> None:
        self.num_steps = num_steps
        self.done = 0
        self._base, self._ffns, self._name, self._config = base, ffns, name, config
        own = {id(ffn.router) for ffn in ffns.values()}
        routers = [ffn.router for ffn in ffns.values() if ffn.router.requires_grad]
        found = (p for ffn in ffns.values() for p in ffn.parameters() if p.requires_grad and id(p) not in own)
        experts = list(dict.fromkeys(found))  # what several layers share comes once
        self.parameters: list[nn.Parameter] = [*experts, *routers]
        groups = [
            {"params": experts, "lr": config.learning_rate},
            {"params": routers, "lr": config.router_learning_rate},
        ]
        self._optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], weight_decay=config.weight_decay
        )
        warmup = max(1, round(config.warmup_share * num_steps))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: rate(step, num_steps, warmup))
        order = random.Random(order_seed)  # noqa: S311 - an order of examples is no secret
        self._batches = _endless(rows, config.batch_size, order)

    def step(self) -> float:
        """Train on the next batch; returns its cross-entropy, nats per answer token.

        Raises:
            NonFiniteError: it is NaN or infinite.
        """
        rows = next(self._batches)
        num_tokens = sum(len(row.answer) for row in rows)
        self._optimizer.zero_grad()
        value = 0.0
        for piece in _pieces(rows, self._config.accumulation):
            batch = collate(piece, self._base.model.device)
            share = len(batch.targets) / num_tokens
            loss = answer_loss(self._base, batch)
            penalty = torch.stack([_balance(ffn, batch) for ffn in self._ffns.values()]).mean()
            ((loss + self._config.balance_coefficient * penalty) * share).backward()  # type: ignore[no-untyped-call]
            value += float(loss.detach()) * share
        torch.nn.utils.clip_grad_norm_(self.parameters, self._config.gradient_clip)
        self._optimizer.step()
        self._schedule.step()
        self.done += 1
        if not math.isfinite(value):
            raise NonFiniteError(
                f"task {self._name}: the loss is {value} at step {self.done}; a lower learning_rate may help"
            )
        return value


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


def _endless(rows: Sequence[Row], batch_size: int, rng: random.Random) -> Iterator[list[Row]]:
    while True:
        yield from shuffled_batches(rows, batch_size=batch_size, rng=rng)


def _pieces(rows: Sequence[Row], accumulation: int) -> Iterator[Sequence[Row]]:
    """`rows` in at most `accumulation` pieces of like size, none empty."""
    size = math.ceil(len(rows) / accumulation)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
