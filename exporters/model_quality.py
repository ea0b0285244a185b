"""What a language model says, measured: greedy answers, logits along given answers, perplexity, and how far two differ.

It knows nothing of formats: `Predict` is the model that was exported, or the base itself.
Read first: two models are compared along the same tokens, those that torch chose; where every next token agrees, each
of them alone would have written the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from runtime.model.attach import attached, hold_mixture
from runtime.model.base import BaseModel
from runtime.model.control import fixed_for, summary
from runtime.model.generation import Generation
from runtime.model.mixture import Mixture
from runtime.model.prompt import PromptTemplate
from runtime.model.repertoire import Repertoire

NUM_TOKENS = 64
"""Tokens of a greedy answer."""

TEXTS = (
    "The harbour was quiet that morning, and the boats that had not gone out lay still beside the stone wall.",
    "Water boils at a lower temperature on a mountain, because the air above it presses less on its surface.",
    "To make the dough, mix flour, salt and yeast, add warm water slowly, and knead it for ten minutes.",
    "The committee will meet again on Tuesday, 14 March, to decide whether the bridge is repaired or replaced.",
    "She closed the book, looked out of the window, and said that it would certainly rain before the evening.",
    "A function that calls itself must have a case in which it does not, or it will never return a value.",
    "Your order has been shipped and should arrive within three working days; you can follow it with this number.",
    "Bees find their way back to the hive by the position of the sun and by the landmarks that they remember.",
    "If the printer does not answer, switch it off, wait for half a minute, and then switch it on again.",
    "In the year 1492 the ships left the small port with about ninety men, three months of food and a letter.",
    "The price of wheat rose by four per cent last week, while that of maize and of soy hardly changed.",
    "Most of the stars that we can see without a telescope are larger and much brighter than our own sun.",
)
"""Ordinary English of many kinds, to measure perplexity on and to be answered."""

Predict = Callable[[torch.Tensor], torch.Tensor]
"""Token ids [T] -> logits [T, V] of the plain base."""


@dataclass(frozen=True)
class Answers:
    """Answers of N cases: `tokens` [N, 64] int64 and the logits that they were chosen from, [N, 64, V] float32."""

    tokens: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class Cases:
    """What is answered: `ids` [N, T], each with the mixture of a task, or with None for the plain base."""

    ids: torch.Tensor
    tasks: tuple[str | None, ...]


def make_cases(base: BaseModel, template: PromptTemplate, tasks: Sequence[str | None], prompts_per_task: int) -> Cases:
    """Prompts for every task, cut from the left to one length so that they fit into one batch."""
    texts = [TEXTS[i % len(TEXTS)] for i in range(len(tasks) * prompts_per_task)]
    encoded = [template.encode(base.tokenizer, text) for text in texts]
    length = min(map(len, encoded))
    named = tuple(task for task in tasks for _ in range(prompts_per_task))
    return Cases(torch.tensor([ids[-length:] for ids in encoded]), named)


@torch.no_grad()
def entering(base: BaseModel, cases: Cases, first_layer: int) -> torch.Tensor:
    """[N, T, D] float32: what enters the first layer with experts for the prompts."""
    found: torch.Tensor = base.model(input_ids=cases.ids, output_hidden_states=True).hidden_states[first_layer]
    return found.float()


def case_mixtures(generation: Generation, cases: Cases, residual: torch.Tensor) -> tuple[Mixture | None, ...]:
    """The mixture of every case, its weights fixed for the prompt where its router weighs whole prompts.

    Args:
        generation: of the tasks.
        cases: N of them.
        residual: [N, T, D], see `entering`.
    """
    return tuple(
        None if task is None else fixed_for(generation.mixture(task), summary(rows))
        for task, rows in zip(cases.tasks, residual, strict=True)
    )


@contextmanager
def attached_mixture(
    repertoire: Repertoire, generation: Generation, mixture: Mixture | None, model: nn.Module
) -> Iterator[None]:
    """`model` with a mixture in the place of its FFNs and attention, and without it on leaving."""
    ffns = {} if mixture is None else hold_mixture(repertoire, generation, mixture, model)
    with attached(model, ffns):
        yield


@torch.no_grad()
def greedy_answer(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
    """Decode greedily behind the prompt `ids` [T]: tokens [64] and their logits [64, V]; no token ends the answer."""
    rows, cache, last = [], None, ids
    for _ in range(NUM_TOKENS):
        output = model(input_ids=last.unsqueeze(0), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, row = output.past_key_values, output.logits[0, -1].float()
        rows.append(row)
        last = row.argmax().unsqueeze(0)
    logits = torch.stack(rows)
    return logits.argmax(1), logits


@torch.no_grad()
def logits_along(model: Any, ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    """Logits [64, V] of a model that is made to answer `tokens` [64] to the prompt `ids` [T], in one pass."""
    forced = torch.cat((ids, tokens[:-1])).unsqueeze(0)
    logits: torch.Tensor = model(input_ids=forced, use_cache=False, logits_to_keep=len(tokens)).logits[0].float()
    return logits


def perplexity(base: BaseModel, predict: Predict) -> float:
    """`exp(-mean log p(token | tokens before it))` over all tokens of `TEXTS` but the first of each."""
    loss, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor(PromptTemplate("", "").encode(base.tokenizer, text))
        loss += float(nn.functional.cross_entropy(predict(ids)[:-1].double(), ids[1:], reduction="sum"))
        count += len(ids) - 1
    return math.exp(loss / count)


def agreement(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Share of rows with the same largest logit."""
    return float((got.argmax(-1) == wanted.argmax(-1)).double().mean())


def divergence(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean over rows of `KL(softmax(wanted) || softmax(got))`, in nats."""
    total = 0.0
    for one, other in zip(got.flatten(0, -2), wanted.flatten(0, -2), strict=True):  # a row at a time: V is large
        log_got, log_wanted = one.double().log_softmax(-1), other.double().log_softmax(-1)
        total += float((log_wanted.exp() * (log_wanted - log_got)).sum())
    return max(0.0, total / got.flatten(0, -2).shape[0])
