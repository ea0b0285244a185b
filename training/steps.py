"""The optimiser loop: cross-entropy of the answers plus the balancing loss, over experts and routers.

It does not know which experts are old, new or probes: what has gradients is trained.
Read first: one step is one batch of `batch_size` examples, computed in `accumulation` pieces; a piece counts by its
answer tokens, so the gradient is that of the whole batch whatever the number of pieces.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from runtime.errors import NonFiniteError
from runtime.kernels.routing import balance_loss
from runtime.model.attach import MixtureFFN
from runtime.model.base import BaseModel
from runtime.model.hyper import EXPERT_WIDTH
from runtime.model.hyper_module import hyper_linears
from training.answer_loss import mean_cross_entropy
from training.batches import Batch, Row, collate, shuffled_batches
from training.config import TrainingConfig
from training.team import Alone, Team

Progress = Callable[[int, int, float], None]
"""Called after every step with (steps done, steps in all, cross-entropy of this step in nats per token)."""


class Steps:
    """Trains what has gradients in `ffns`, one batch at a time.

        loss = mean over answer and end tokens of cross-entropy + lambda * mean over layers of the balancing loss

    Args:
        base: with `ffns` attached while `step` runs.
        ffns: layer -> mixture; their trainable parameters are trained, routers at a rate of their own, and linears of a
            hypernetwork at the experts' over their 128 inputs. What AdamW adds to a weight has the size of the rate
            whatever the gradient's; so a number that a linear writes moves by the sum over its inputs, and would move a
            hundred times as far as one that is trained itself (ours; Yang et al., arXiv 2203.03466, scale so with the
            width).
        rows: examples, at least one.
        name: for messages.
        config: rates, sizes, clipping.
        num_steps: over which the rate rises and falls.
        order_seed: of the order of examples.
        team: the processes that train together; None is this one alone.
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
        team: Team | None = None,
    ) -> None:
        self.num_steps = num_steps
        self.done = 0
        self._team = team or Alone()
        self._base, self._ffns, self._name, self._config = base, ffns, name, config
        own = {id(ffn.router) for ffn in ffns.values()}
        routers = [ffn.router for ffn in ffns.values() if ffn.router.requires_grad]
        found = (p for ffn in ffns.values() for p in ffn.parameters() if p.requires_grad and id(p) not in own)
        experts = list(dict.fromkeys(found))  # what several layers share comes once
        self.parameters: list[nn.Parameter] = [*experts, *routers]
        linears = {id(weight) for weight in hyper_linears(ffns.values())}
        groups = [
            {"params": [p for p in experts if id(p) not in linears], "lr": config.learning_rate},
            {"params": [p for p in experts if id(p) in linears], "lr": config.learning_rate / EXPERT_WIDTH},
            {"params": routers, "lr": config.router_learning_rate},
        ]
        self._optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], weight_decay=config.weight_decay
        )
        self._peaks = [float(group["lr"]) for group in self._optimizer.param_groups]
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
        own = 0.0
        pieces = _pieces(rows, self._config.accumulation * self._team.size)
        for piece in pieces[self._team.index :: self._team.size]:
            batch = collate(piece, self._base.model.device)
            share = len(batch.targets) / num_tokens
            loss = answer_loss(self._base, batch)
            penalty = torch.stack([_balance(ffn, batch) for ffn in self._ffns.values()]).mean()
            ((loss + self._config.balance_coefficient * penalty) * share).backward()  # type: ignore[no-untyped-call]
            own += float(loss.detach()) * share
        value = self._team.sum_gradients(self.parameters, own)
        torch.nn.utils.clip_grad_norm_(self.parameters, self._config.gradient_clip)
        warmup = max(1, round(self._config.warmup_share * self.num_steps))
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * rate(self.done, self.num_steps, warmup)
        self._optimizer.step()
        self.done += 1
        if not math.isfinite(value):
            raise NonFiniteError(
                f"task {self._name}: the loss is {value} at step {self.done}; a lower learning_rate may help"
            )
        return value

    def state(self) -> dict[str, torch.Tensor]:
        """For a checkpoint: parameters and what the optimiser remembers of each."""
        tensors: dict[str, torch.Tensor] = {f"parameter.{i}": p.detach() for i, p in enumerate(self.parameters)}
        for i, parameter in enumerate(self.parameters):
            tensors |= {f"optimiser.{i}.{key}": value for key, value in self._optimizer.state[parameter].items()}
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, torch.Tensor], *, done: int) -> None:
        """Go on after `done` steps from what `state` gave there; before the first step only."""
        for i, parameter in enumerate(self.parameters):
            parameter.copy_(tensors[f"parameter.{i}"])
            prefix = f"optimiser.{i}."
            found = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
            for key, value in found.items():
                place = value.device if key == "step" else parameter.device
                self._optimizer.state[parameter][key] = value.to(place)
        for _ in range(done):
            next(self._batches)
        self.done = done


def answer_loss(base: BaseModel, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the tokens of `batch.targets`, in nats; a scalar with a graph where gradients are on."""
    hidden = base.model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state  # [B, T, D]
    # Only what is predicted goes through the head: [1, n, D].
    logits = _head_logits(base, hidden[batch.predicts].unsqueeze(0))[0]  # [n, V]
    return mean_cross_entropy(logits, batch.targets)


def _head_logits(base: BaseModel, hidden: torch.Tensor) -> torch.Tensor:
    """What the whole model makes of its decoder's output, [1, n, D] -> [1, n, V].

    That is the head and whatever the architecture does to logits: Gemma 2 caps them, Granite divides them. So the
    model's own forward runs, with a decoder that only hands over what is there.
    """
    model: Any = base.model
    name, decoder = model.base_model_prefix, model.base_model
    setattr(model, name, _Given(hidden))
    try:
        logits: torch.Tensor = model(inputs_embeds=hidden, use_cache=False).logits
    finally:
        setattr(model, name, decoder)
    return logits


class _Given(nn.Module):
    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self._output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)

    def forward(self, *_ids: object, **_inputs: object) -> BaseModelOutputWithPastAndCrossAttentions:
        return self._output


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


def _pieces(rows: Sequence[Row], num_pieces: int) -> list[Sequence[Row]]:
    """`rows` in at most `num_pieces` pieces of like size, none empty."""
    size = math.ceil(len(rows) / num_pieces)
    return [rows[start : start + size] for start in range(0, len(rows), size)]
