"""Choosing the next token of each sequence from its logits.

It knows nothing of sequences' other state, nor of how options cut a distribution (`runtime.engine.warping`).
Read first: every answer draws from its own generator, so what it gets does not depend on what else is in the batch.
Greedy answers without options, the usual case, take one argmax over the whole batch.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from runtime.engine.logprobs import token_logprob
from runtime.engine.matcher import Matcher
from runtime.engine.penalties import Penalties
from runtime.engine.request import MAX_SEED, SamplingParams, TokenLogprob
from runtime.engine.warping import warp
from runtime.errors import GreenroomError


@dataclass(frozen=True)
class Chosen:
    """A token.

    Args:
        token: its id.
        logprob: how likely it and others were, where that was asked for.
        complete: the constraint is fulfilled and allows nothing more.
    """

    token: int
    logprob: TokenLogprob | None = None
    complete: bool = False


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        params: how.
        prompt: token ids.
        tokenizer: for the texts of log-probabilities.
        choice: number of the answer among those of one prompt.
        matcher: what the answer may be, if that is constrained; for this answer alone.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        *,
        tokenizer: Tokenizer,
        choice: int = 0,
        matcher: Matcher | None = None,
    ) -> None:
        self._greedy = params.temperature == 0
        self._num_top = params.logprobs
        self._penalties = Penalties(params, prompt)
        self._matcher = matcher
        self._tokenizer = tokenizer
        self._params = params
        if not self._greedy:
            seed = secrets.randbits(63) if params.seed is None else (params.seed + choice) & MAX_SEED
            self._generator = torch.Generator().manual_seed(seed)

    @property
    def plain(self) -> bool:
        """The token is the argmax of the logits, and nothing else is wanted."""
        return self._greedy and self._num_top is None and self._matcher is None and not self._penalties.active

    def choose(self, logits: torch.Tensor) -> Chosen:
        """Return the next token for logits [V] float32, which are left as they are.

        Raises InvalidInputError where the constraint became too complex to follow.
        """
        scores = logits.cpu()
        if self._penalties.active or self._matcher is not None:
            scores = scores.clone()
            self._penalties.apply(scores)
        if self._matcher is not None:
            self._matcher.mask(scores)
        token = int(scores.argmax()) if self._greedy else self._draw(scores)
        self._penalties.add(token)
        complete = self._matcher is not None and self._matcher.advance(token)
        logprob = None if self._num_top is None else token_logprob(logits, token, self._num_top, self._tokenizer)
        return Chosen(token, logprob, complete)

    def _draw(self, scores: torch.Tensor) -> int:
        probabilities = torch.softmax(warp(scores, self._params), dim=0)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def choose(samplers: Sequence[Sampler], logits: torch.Tensor) -> list[Chosen | GreenroomError]:
    """The next token of each answer, or why it cannot have one, for logits [B, V] float32."""
    # NumPy is ten times faster at this than torch on a CPU; both take the first of equal logits.
    best = (logits.numpy() if logits.device.type == "cpu" else logits).argmax(1).tolist()
    chosen: list[Chosen | GreenroomError] = []
    for row, (sampler, token) in enumerate(zip(samplers, best, strict=True)):
        try:
            chosen.append(Chosen(token) if sampler.plain else sampler.choose(logits[row]))
        except GreenroomError as error:
            chosen.append(error)
    return chosen
