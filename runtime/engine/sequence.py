"""A sequence: one request on its way through the engine.

It knows nothing of how it is computed or scheduled; it only holds state and reports events.
Read first: a prompt goes through ranges of layers, all of its tokens through one range before the next begins; between
two ranges `residual` keeps its residual stream. A slot and a reservation are given back in `_close`, exactly once.
Where one prompt gets several answers, each is a sequence; `choices` are all of them, and the request ends when the last
of them does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from enum import Enum, auto

import torch
from tokenizers import Tokenizer

from runtime.engine.explain import Explanation
from runtime.engine.logprobs import token_text
from runtime.engine.matcher import Matcher
from runtime.engine.request import Alternative, Event, Failed, Finished, FinishReason, Request, TokenDelta, Usage
from runtime.engine.sampling import Chosen, Sampler
from runtime.engine.text import TextStream
from runtime.errors import GreenroomError
from runtime.memory.reservation import Prefetch, Reservation
from runtime.model.generation import Generation
from runtime.model.locator import Decision
from runtime.model.mixture import Mixture

_log = logging.getLogger(__name__)

Sink = Callable[[Event], None]


class Phase(Enum):
    """Where a sequence stands."""

    WAITING = auto()  # holds nothing
    PROMPT = auto()  # holds KV; the prompt runs through the layers whose experts are there
    DECODING = auto()
    ENDED = auto()


class Sequence:
    """State of one request.

    Args:
        request: what was asked.
        prompt: token ids, at least one.
        generation: the one it began with, and keeps.
        max_tokens: new tokens at most, after clipping to the context.
        sink: gets the events.
        tokenizer: for the text.
        matcher: what the answer may be, if that is constrained; for this sequence alone.
        leader: the sequence that runs the prompt, where this one is another answer to it.
        num_context: tokens before the continuation that is to be scored; None where there is none.

    Attributes:
        scored: log-probabilities of the continuation's tokens so far.
        layers_done: layers that the whole prompt has passed.
        range_end: the layer before which the range ends that the prompt goes through now.
        tokens_done: prompt tokens that have passed this range.
        entered: what earlier prompts left of its expert layers has been looked up.
        tokens_skipped: the first tokens of a prompt, whose keys and values in these layers were known before.
        residual: [T, D] before `layers_done`, and for the tokens done before `range_end`; None before the first range.
        decided: the task is fixed.
        task: whose mixture it gets, or the tasks' names joined; None for the plain base model.
        cached_tokens: tokens of the prompt that no layer had to compute.
        mixture: what it computes with; None while the task's routers are not in memory, and for the plain base model.
        awaits_experts: what it needs is known, and is to be reserved.
        stalled_since: when the prompt came to stand before a layer whose experts are not there; None while it moves.

    `on_end` is called when the sequence ends, before its last event leaves.
    """

    def __init__(
        self,
        request: Request,
        prompt: list[int],
        *,
        generation: Generation,
        max_tokens: int,
        sink: Sink,
        tokenizer: Tokenizer,
        matcher: Matcher | None = None,
        leader: Sequence | None = None,
        num_context: int | None = None,
    ) -> None:
        self.request = request
        self.prompt = prompt
        self.generation = generation
        self.max_tokens = max_tokens
        self.phase = Phase.WAITING
        self.num_context = len(prompt) if num_context is None else num_context
        self.scored: list[float] = []
        self.output: list[int] = []
        self.times_passed = 0
        self.slot: int | None = None
        self.layers_done = 0
        self.range_end = 0
        self.tokens_done = 0
        self.tokens_skipped = 0
        self.entered = False
        self.cached_tokens = 0
        self.residual: torch.Tensor | None = None
        self.decision: Decision | None = None
        self.task: str | None = None
        self.mixture: Mixture | None = None
        self.reservation: Reservation | None = None
        self.decided = False
        self.decided_at = 0.0
        self.awaits_experts = False
        self.stalled_since: float | None = None
        self.guess: Prefetch | None = None
        self.guessed_task: str | None = None
        self.explanation: Explanation = leader.explanation if leader else Explanation()
        self.on_end: Callable[[Sequence], None] = lambda _sequence: None
        self._sink = sink
        self._tokenizer = tokenizer
        self.choices: list[Sequence] = leader.choices if leader else []
        self.choice = len(self.choices)
        self.choices.append(self)
        self.sampler = Sampler(request.sampling, prompt, tokenizer=tokenizer, choice=self.choice, matcher=matcher)
        self._reason: FinishReason = "length"
        self._text = TextStream(tokenizer, request.sampling.stop)
        self._logits: list[torch.Tensor] = []
        self._submitted = time.monotonic()
        self._admitted = self._first_token = self._submitted

    @property
    def num_tokens(self) -> int:
        """Tokens that the KV cache must be able to hold at the end."""
        return len(self.prompt) + self.max_tokens

    @property
    def tasks(self) -> tuple[str, ...]:
        """Whose mixtures it gets; none before that is fixed, and for the plain base model."""
        return () if self.task is None else tuple(self.request.named_tasks) or (self.task,)

    @property
    def context_residual(self) -> torch.Tensor | None:
        """The residual stream between two ranges, without the continuation that is to be scored."""
        return None if self.residual is None else self.residual[: self.num_context]

    @property
    def answering(self) -> range:
        """Places of the prompt that an answer's tokens come of: its last, or those before each token that is scored."""
        end = len(self.prompt) - (self.request.continuation is not None)
        return range(self.num_context - 1, end)

    @property
    def position(self) -> int:
        """Position of the newest output token, which the next decode step feeds."""
        return len(self.prompt) + len(self.output) - 1

    @property
    def held_slot(self) -> int:
        """The KV slot of a running sequence."""
        assert self.slot is not None, "a running sequence holds a slot"
        return self.slot

    def start(self, slot: int) -> None:
        """Leave the queue with a KV slot."""
        self.slot = slot
        self.times_passed = 0
        self._admitted = time.monotonic()
        self.phase = Phase.PROMPT

    def advance(self, length: int) -> bool:
        """`length` more prompt tokens have passed the range; True if that were the last of them."""
        self.tokens_done += length
        if self.tokens_done < len(self.prompt):
            return False
        self.layers_done, self.tokens_done = self.range_end, self.tokens_skipped
        return True

    def emit(self, event: Event) -> None:
        """Hand an event to the caller; a caller that cannot take it any more is logged and ignored."""
        try:
            self._sink(event)
        except RuntimeError as error:  # the caller's event loop is closed
            _log.warning("request %s: event dropped: %s", self.request.request_id, error)

    def keep(self, logits: torch.Tensor) -> None:
        """Keep the logits [V] of the token that is taken next."""
        if self.phase is not Phase.ENDED:
            self._logits.append(logits.float().cpu())

    def take(self, chosen: Chosen, eos_token_ids: tuple[int, ...]) -> None:
        """Add a token, emit its text, and end if it is the last."""
        if self.phase is Phase.ENDED:
            return
        if not self.output:
            self._first_token = time.monotonic()
        self.output.append(chosen.token)
        if chosen.token in eos_token_ids and not self.request.sampling.ignore_eos:
            self._say(self._text.finish(), chosen)
            self.finish("stop")
            return
        text, stopped = self._text.push(chosen.token)
        self._say(text, chosen)
        if stopped:
            self.finish("stop")
        elif chosen.complete or len(self.output) >= self.max_tokens:
            if text := self._text.finish():
                self.emit(TokenDelta(text, (), self.choice))
            self.finish("stop" if chosen.complete else "length")

    def _say(self, text: str, chosen: Chosen) -> None:
        logprobs = (chosen.logprob,) if chosen.logprob else ()
        self.emit(TokenDelta(text, (chosen.token,), self.choice, logprobs))

    def finish(self, reason: FinishReason) -> None:
        """End with an answer; the request ends with the last of its choices."""
        if self.phase is Phase.ENDED:
            return  # a request ends once; what comes later (a cancellation that crossed the last token) is void
        self._reason = reason
        self._close()
        if all(choice.phase is Phase.ENDED for choice in self.choices):
            self.emit(self.choices[0].finished())

    def fail(self, error: GreenroomError) -> None:
        """End without an answer, all choices together."""
        open_choices = [choice for choice in self.choices if choice.phase is not Phase.ENDED]
        for choice in open_choices:
            choice._close()  # noqa: SLF001 - a sequence of the same request
        if open_choices:
            self.emit(Failed(error, self.choices[0].usage()))

    def finished(self) -> Finished:
        """The last event of the request, for its first choice to make."""
        reason, *others = (choice._reason for choice in self.choices)  # noqa: SLF001 - a sequence of the same request
        logits = torch.stack(self._logits).numpy().tobytes() if self._logits else b""
        return Finished(
            reason=reason,
            other_reasons=tuple(others),
            usage=self.usage(),
            logits=logits,
            explanation=self.explanation.layers() if self.request.explain else (),
            scored=tuple(
                Alternative(token, token_text(self._tokenizer, token), logprob)
                for token, logprob in zip(self.prompt[self.num_context :], self.scored, strict=True)
            )
            if reason == "scored"
            else (),
        )

    def usage(self) -> Usage:
        """What the request took, for its first choice to tell."""

        def since(moment: float) -> float:
            return max(0.0, moment - self._submitted)

        return Usage(
            prompt_tokens=len(self.prompt),
            completion_tokens=sum(len(choice.output) for choice in self.choices),
            queue_s=since(self._admitted),
            first_token_s=since(self._first_token) if self.output else 0.0,
            total_s=since(time.monotonic()),
            located_s=since(self.decided_at),
            load_s=self.reservation.load_s if self.reservation is not None else 0.0,
            cached_tokens=self.cached_tokens,
        )

    def _close(self) -> None:
        self.phase = Phase.ENDED
        if self.guess is not None:
            self.guess.cancel()
        if self.reservation is not None:
            self.reservation.release()
        self.residual = None
        self.on_end(self)
