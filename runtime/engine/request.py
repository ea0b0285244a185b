"""What goes into the engine and what comes out of it: requests and events.

It knows nothing of tensors, models or gRPC; both the service and the batch job speak to the engine in these words.
Read first: a request ends in exactly one `Finished` or one `Failed`; before that come at most one `Located` and any
number of `TokenDelta`, in order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from runtime.engine.route import check_route, shares
from runtime.errors import GreenroomError, InvalidInputError
from runtime.model.turns import Message, check_chat

MAX_STOP_STRINGS = 8
MAX_STOP_LENGTH = 256
MAX_SEED = 2**63 - 1
MAX_CHOICES = 16
MAX_PRIORITY = 100
MAX_TOP_LOGPROBS = 20
MAX_SCHEMA_CHARS = 65_536
MAX_REGEX_CHARS = 4_096


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when an answer ends.

    Logits go through these steps in this order: repetition penalty, presence and frequency penalty, the constraint,
    temperature, top-k, top-p, min-p, and then a draw, or with temperature 0 the largest.

    Args:
        max_tokens: new tokens of each choice at most, >= 1.
        temperature: 0 is greedy; otherwise logits are divided by it; 0..10.
        top_p: smallest set of tokens whose probabilities reach it, 0 < top_p <= 1; 1 keeps all.
        top_k: the k likeliest tokens, 0 keeps all.
        min_p: tokens at least this fraction as likely as the likeliest, 0..1; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the answer so
            far, 0 < penalty <= 10; 1 changes nothing (CTRL, arXiv 1909.05858).
        presence_penalty: subtracted once from the logits of tokens in the answer so far, -2..2.
        frequency_penalty: subtracted as often as a token is in the answer so far, -2..2.
        seed: makes sampling repeatable for this request; choice i draws with seed + i; None draws a fresh one.
        n: answers of one prompt, which runs through the model once; 1..16.
        logprobs: report the chosen tokens' log-probabilities and this many alternatives, 0..20; None reports nothing.
        json_schema: the answer is JSON of this schema, itself JSON.
        regex: the answer matches this regular expression from its beginning to its end; excludes `json_schema`.
        stop: strings that end the answer; they are not part of it.
        ignore_eos: go on after the model's end token, for measurements.

    Raises:
        InvalidInputError: a value out of range, or two that exclude each other.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    json_schema: str | None = None
    regex: str | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidInputError("max_tokens", self.max_tokens, "must be at least 1")
        if not (math.isfinite(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise InvalidInputError("top_p", self.top_p, "must be above 0 and at most 1")
        if not (math.isfinite(self.repetition_penalty) and 0.0 < self.repetition_penalty <= 10.0):
            raise InvalidInputError("repetition_penalty", self.repetition_penalty, "must be above 0 and at most 10")
        if self.top_k < 0:
            raise InvalidInputError("top_k", self.top_k, "must be 0 (all) or positive")
        self._check_between("temperature", 0, 10)
        self._check_between("min_p", 0, 1)
        self._check_between("presence_penalty", -2, 2)
        self._check_between("frequency_penalty", -2, 2)
        self._check_between("seed", 0, MAX_SEED)
        self._check_between("n", 1, MAX_CHOICES)
        self._check_between("logprobs", 0, MAX_TOP_LOGPROBS)
        self._check_texts()

    def _check_between(self, field: str, low: int, high: int) -> None:
        value = getattr(self, field)
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            raise InvalidInputError(field, value, f"must be between {low} and {high}")

    def _check_texts(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidInputError("stop", len(self.stop), f"at most {MAX_STOP_STRINGS} stop strings")
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP_LENGTH:
                raise InvalidInputError("stop", text, f"a stop string has 1 to {MAX_STOP_LENGTH} characters")
        for name, limit in (("json_schema", MAX_SCHEMA_CHARS), ("regex", MAX_REGEX_CHARS)):
            value = getattr(self, name)
            if value is None:
                continue
            if not 0 < len(value) <= limit:
                raise InvalidInputError(name, value, f"must have 1 to {limit} characters")
            if self.ignore_eos:
                raise InvalidInputError(name, value, "says where the answer ends, which excludes ignore_eos")
        if self.json_schema is not None and self.regex is not None:
            raise InvalidInputError("regex", self.regex, "excludes json_schema")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to answer.

    Args:
        request_id: unique among the requests in flight.
        text: the input; wrapped in the repertoire's prompt template unless `raw`.
        raw: take `text` as the whole prompt.
        messages: a chat instead of `text`; see `runtime.model.turns`.
        task: pin this task; None lets the locator decide.
        task_weights: task -> weight >= 0; all of them answer together, each with its share; excludes `task`.
        base_only: answer with the plain base model, no locator; excludes `task`.
        locate_only: end after `Located`; no token is generated.
        continuation: score this text as the answer instead of generating one; see `Finished.scored`.
        abstain_fails: where no task is near enough, fail with NoTaskNearError instead of answering by the base.
        default_task: where no task is near enough, this one answers; excludes `abstain_fails`.
        sampling: see `SamplingParams`.
        deadline: absolute, on the clock of `time.monotonic()`; None waits for ever.
        priority: of waiting requests those with the lowest are tried first, -100..100; none waits for ever.
        tenant: in whose name; the policy "fair" tries the tenant with the fewest running sequences first, and experts
            that it uses may count for a floor (`EngineOptions.tenant_floors`).
        share_prefix: may begin where earlier prompts left off, and leave beginnings to later ones.
        keep_logits: return the logits of every generated token in `Finished` (proofs and tests).
        group_bias: group -> what is added to its logit in every layer, -100 to 100; of a task with a grouped router.
        group_mask: groups that get no weight at all.
        explain: return the mean weights of groups and experts in `Finished`.
    """

    request_id: str
    text: str = ""
    raw: bool = False
    messages: tuple[Message, ...] = ()
    task: str | None = None
    task_weights: Mapping[str, float] = field(default_factory=dict)
    base_only: bool = False
    locate_only: bool = False
    continuation: str | None = None
    abstain_fails: bool = False
    default_task: str | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    deadline: float | None = None
    priority: int = 0
    tenant: str = ""
    share_prefix: bool = True
    keep_logits: bool = False
    group_bias: Mapping[str, float] = field(default_factory=dict)
    group_mask: frozenset[str] = frozenset()
    explain: bool = False

    def __post_init__(self) -> None:
        self._check_prompt()
        check_route(self)
        if self.keep_logits and self.sampling.n > 1:
            raise InvalidInputError("keep_logits", self.keep_logits, "is for requests with a single choice")
        if not -MAX_PRIORITY <= self.priority <= MAX_PRIORITY:
            raise InvalidInputError("priority", self.priority, f"must be within +-{MAX_PRIORITY}")

    @property
    def named_tasks(self) -> Mapping[str, float]:
        """The tasks that the request names itself, with shares that sum to 1; none where it leaves that open."""
        return {self.task: 1.0} if self.task is not None else shares(self.task_weights)

    def _check_prompt(self) -> None:
        if not self.text and not self.messages:
            raise InvalidInputError("text", self.text, "must not be empty")
        if self.messages and (self.text or self.raw):
            raise InvalidInputError("messages", len(self.messages), "excludes text and raw")
        check_chat(self.messages)
        if self.continuation is not None and not self.continuation:
            raise InvalidInputError("continuation", self.continuation, "must not be empty")


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


How = Literal["located", "pinned", "weighted", "defaulted", "abstained", "base"]
"""By the locator; by the caller; by the caller's weights; the caller's default, since no task is near enough; none is,
so the base answers; the base was asked for, or there are no tasks."""


@dataclass(frozen=True, kw_only=True)
class Located:
    """The mixture of a sequence is decided and its experts are loaded.

    Args:
        task: t*, or None for the plain base model and where several tasks answer together.
        how: see `How`.
        margin: score of the second-best task minus that of the best, >= 0; 0 where fewer than two tasks were scored.
        scores: all tasks, best first; empty where no locator ran.
        generation: generation of the repertoire.
        experts: the visible set.
        task_weights: task -> share, where the caller gave weights.
    """

    task: str | None
    how: How
    margin: float
    scores: tuple[TaskScore, ...]
    generation: int
    experts: tuple[ExpertUse, ...]
    task_weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Alternative:
    """One token at one place of an answer: its id, its text alone, and the natural logarithm of its probability."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """The token that was chosen and the likeliest ones, best first, by the model's own distribution.

    That is the softmax of the logits before any penalty, constraint or temperature.
    """

    chosen: Alternative
    top: tuple[Alternative, ...]


@dataclass(frozen=True)
class TokenDelta:
    """New text of one choice and the tokens behind it; text may lag while bytes of one character are incomplete.

    `logprobs` has one entry per token where they were asked for, else none.
    """

    text: str
    token_ids: tuple[int, ...]
    choice: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Counts of one request, over all its choices, and seconds since it was submitted, 0 for what it did not come to.

    `queue_s` is when it left the queue, `located_s` when its mixture was decided; `load_s` is how long its experts
    then took, while the prompt ran through the layers whose experts were there. `cached_tokens` of the prompt were
    known from earlier ones in every layer; those known only below the experts are not among them.
    """

    prompt_tokens: int
    completion_tokens: int
    queue_s: float
    first_token_s: float
    total_s: float
    located_s: float = 0.0
    load_s: float = 0.0
    cached_tokens: int = 0


FinishReason = Literal["stop", "length", "located", "scored"]


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """How much each expert and group of one layer had to say, on average over the tokens of an answer.

    Args:
        layer: index.
        experts: digest of the expert set -> mean weight.
        groups: name of the group -> sum of its experts' mean weights; empty for routers without groups.
    """

    layer: int
    experts: Mapping[str, float]
    groups: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The last event of a request that was answered.

    Args:
        reason: of the first choice: "stop" (end token, stop string, or the constraint is fulfilled), "length"
            (max_tokens or context), "located" (locate_only), "scored" (continuation).
        other_reasons: of the choices after the first.
        usage: counts and times.
        logits: bytes of float32 [tokens, vocabulary] where `keep_logits` was set, else empty.
        explanation: of every layer with experts where `explain` was set, else empty.
        scored: the tokens of the continuation, each with its log-probability after all before it.
    """

    reason: FinishReason
    usage: Usage
    other_reasons: tuple[FinishReason, ...] = ()
    logits: bytes = b""
    explanation: tuple[LayerWeights, ...] = ()
    scored: tuple[Alternative, ...] = ()


@dataclass(frozen=True)
class Failed:
    """The last event of a request that could not be answered, and what it used until then where that is known."""

    error: GreenroomError
    usage: Usage | None = None


Event = Located | TokenDelta | Finished | Failed
