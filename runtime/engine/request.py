"""What goes into the engine and what comes out of it: requests and events.

It knows nothing of tensors, models or gRPC; both the service and the batch job speak to the engine in these words.
Read first: a request ends in exactly one `Finished` or one `Failed`; before that come at most one `Located` and any
number of `TokenDelta`, in order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from runtime.errors import GreenroomError, InvalidInputError

MAX_STOP_STRINGS = 8
MAX_STOP_LENGTH = 256
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when a sequence ends.

    Args:
        max_tokens: new tokens at most, >= 1.
        temperature: 0 is greedy; otherwise logits are divided by it; 0..10.
        top_p: smallest set of tokens whose probabilities reach it, 0 < top_p <= 1; 1 keeps all.
        top_k: the k likeliest tokens, 0 keeps all.
        seed: makes sampling repeatable for this request; None draws a fresh one.
        stop: strings that end the answer; they are not part of it.
        ignore_eos: go on after the model's end token, for measurements.

    Raises:
        InvalidInputError: a value out of range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidInputError("max_tokens", self.max_tokens, "must be at least 1")
        if not (math.isfinite(self.temperature) and 0.0 <= self.temperature <= 10.0):
            raise InvalidInputError("temperature", self.temperature, "must be between 0 and 10")
        if not (math.isfinite(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise InvalidInputError("top_p", self.top_p, "must be above 0 and at most 1")
        if self.top_k < 0:
            raise InvalidInputError("top_k", self.top_k, "must be 0 (all) or positive")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise InvalidInputError("seed", self.seed, f"must be between 0 and {MAX_SEED}")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidInputError("stop", len(self.stop), f"at most {MAX_STOP_STRINGS} stop strings")
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP_LENGTH:
                raise InvalidInputError("stop", text, f"a stop string has 1 to {MAX_STOP_LENGTH} characters")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to answer.

    Args:
        request_id: unique among the requests in flight.
        text: the input; wrapped in the repertoire's prompt template unless `raw`.
        raw: take `text` as the whole prompt.
        task: pin this task; None lets the locator decide.
        base_only: answer with the plain base model, no locator; excludes `task`.
        locate_only: end after `Located`; no token is generated.
        sampling: see `SamplingParams`.
        deadline: absolute, on the clock of `time.monotonic()`; None waits for ever.
        keep_logits: return the logits of every generated token in `Finished` (proofs and tests).
    """

    request_id: str
    text: str
    raw: bool = False
    task: str | None = None
    base_only: bool = False
    locate_only: bool = False
    sampling: SamplingParams = field(default_factory=SamplingParams)
    deadline: float | None = None
    keep_logits: bool = False

    def __post_init__(self) -> None:
        if not self.text:
            raise InvalidInputError("text", self.text, "must not be empty")
        if self.base_only and self.task is not None:
            raise InvalidInputError("task", self.task, "cannot be pinned together with base_only")


@dataclass(frozen=True)
class TaskScore:
    """Score of one task for one prompt; lower is nearer."""

    task: str
    score: float


@dataclass(frozen=True, kw_only=True)
class ExpertUse:
    """One expert set that a sequence may use, and where it came from.

    Args:
        digest: identity of the expert set.
        task: the task it was trained for.
        num_layers: how many (layer, expert) units the sequence reserved.
        source: "host" if every unit was resident when asked for, "disk" if at least one had to be read.
        bytes_read: bytes read from disk for this sequence.
        load_s: seconds from asking until all its units were ready.
    """

    digest: str
    task: str
    num_layers: int
    source: Literal["host", "disk"]
    bytes_read: int
    load_s: float


@dataclass(frozen=True, kw_only=True)
class Located:
    """The mixture of a sequence is decided and its experts are loaded.

    Args:
        task: t*, or None for the plain base model.
        how: "located", "pinned" (by the caller), "abstained" (no task is near enough), "base" (asked for, or no tasks).
        margin: score of the second-best task minus that of the best, >= 0; 0 where fewer than two tasks were scored.
        scores: all tasks, best first; empty where no locator ran.
        generation: generation of the repertoire.
        experts: the visible set.
    """

    task: str | None
    how: Literal["located", "pinned", "abstained", "base"]
    margin: float
    scores: tuple[TaskScore, ...]
    generation: int
    experts: tuple[ExpertUse, ...]


@dataclass(frozen=True)
class TokenDelta:
    """New text and the tokens behind it; the text may lag while bytes of one character are incomplete."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Counts and times of one request; times are seconds since it was submitted, 0 for what it did not come to.

    `queue_s` is when it left the queue, `located_s` when its mixture was decided; `load_s` is how long its experts
    then took, while the prompt ran through the layers whose experts were there.
    """

    prompt_tokens: int
    completion_tokens: int
    queue_s: float
    first_token_s: float
    total_s: float
    located_s: float = 0.0
    load_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The last event of a request that was answered.

    Args:
        reason: "stop" (end token or stop string), "length" (max_tokens or context), "located" (locate_only).
        usage: counts and times.
        logits: bytes of float32 [tokens, vocabulary] where `keep_logits` was set, else empty.
    """

    reason: Literal["stop", "length", "located"]
    usage: Usage
    logits: bytes = b""


@dataclass(frozen=True)
class Failed:
    """The last event of a request that could not be answered, and what it used until then where that is known."""

    error: GreenroomError
    usage: Usage | None = None


Event = Located | TokenDelta | Finished | Failed
