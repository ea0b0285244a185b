"""What the client returns: immutable, typed results without protobuf in sight.

It knows nothing of gRPC; `greenroom.wire` fills these classes.
Read first: a stream yields one `Routing`, any number of `Delta`, one `Done`; an `Answer` is all of them together.
Bytes and seconds are in the names; scores have no unit, lower is nearer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

How = Literal["located", "pinned", "abstained", "base", "defaulted", "weighted"]
Source = Literal["host", "disk"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TaskScore:
    """Distance of a prompt from one task; lower is nearer."""

    task: str
    score: float


@dataclass(frozen=True, kw_only=True)
class ExpertUse:
    """One expert set that answered, and where it was when it was needed.

    Args:
        digest: SHA-256 of config and weights, 64 hexadecimal digits.
        task: the task it was trained for.
        num_layers: layers that hold an expert of this set.
        source: "host" if all of it was in memory, "disk" if any of it had to be read.
        bytes_read: bytes read from disk for this request.
        load_s: seconds until all of it was ready.
    """

    digest: str
    task: str
    num_layers: int
    source: Source
    bytes_read: int
    load_s: float


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Which task answers, why, and with which experts.

    Args:
        task: None where the plain base model answers, or several tasks together.
        how: "located", "pinned" (by the caller), "abstained" (no task is near enough), "base" (asked for, or no task),
            "defaulted" (no task is near enough, so the caller's default), "weighted" (by the caller's weights).
        margin: score of the second-best task minus that of the best; 0 where fewer than two were scored.
        scores: every task, best first; empty where no locator ran.
        generation: generation of the repertoire.
        experts: the expert sets in use.
        request_id: names the request in the server's logs.
        task_weights: task -> share where `how` is "weighted"; they sum to 1.
    """

    task: str | None
    how: How
    margin: float
    scores: tuple[TaskScore, ...]
    generation: int
    experts: tuple[ExpertUse, ...]
    request_id: str
    task_weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Alternative:
    """One token at one place: its id, its text alone, and the natural logarithm of its probability."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """The token of the answer and the likeliest ones, best first; before penalties, constraints and temperature."""

    chosen: Alternative
    top: tuple[Alternative, ...]


@dataclass(frozen=True)
class Delta:
    """A piece of one answer and the tokens behind it; the text may be empty.

    `choice` counts the `n` answers from 0; `logprobs` has one entry per token where they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    choice: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Counts of one request, and seconds since the engine took it; `cached_tokens` of the prompt were not computed."""

    prompt_tokens: int
    completion_tokens: int
    queue_s: float
    first_token_s: float
    total_s: float
    cached_tokens: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Tokens generated per second since the request left the queue; 0 where no time passed."""
        busy_s = self.total_s - self.queue_s
        return self.completion_tokens / busy_s if busy_s > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """How much each expert (by digest) and group of one layer had to say, on average over the tokens of the answer."""

    layer: int
    experts: Mapping[str, float]
    groups: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Done:
    """The end of an answer: "stop" (end token, stop string, constraint fulfilled) or "length" (max_tokens or context).

    `other_finish_reasons` are those of the choices after the first; `explanation` is empty unless it was asked for.
    """

    finish_reason: FinishReason
    usage: Usage
    request_id: str
    other_finish_reasons: tuple[FinishReason, ...] = ()
    explanation: tuple[LayerWeights, ...] = ()


StreamEvent = Routing | Delta | Done


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of the `n` answers of a prompt; fields as in `Delta` and `Done`."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A whole answer; fields as in `Routing`, `Delta` and `Done`; text, tokens and reason are the first choice's."""

    choices: tuple[Choice, ...]
    routing: Routing
    usage: Usage
    request_id: str
    explanation: tuple[LayerWeights, ...] = ()

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of the first choice."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Of the first choice."""
        return self.choices[0].finish_reason


@dataclass(frozen=True, kw_only=True)
class Score:
    """How likely the model finds a given answer.

    Args:
        routing: who scores.
        tokens: of the answer, each with its log-probability after all before it.
        logprob: sum of their log-probabilities.
        usage: what it took; `prompt_tokens` counts the answer too.
        explanation: of every layer with experts, where it was asked for.
    """

    routing: Routing
    tokens: tuple[Alternative, ...]
    logprob: float
    usage: Usage
    explanation: tuple[LayerWeights, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MemoryStatistics:
    """Experts in the server's memory; a unit is one expert of one layer; counts run since the server started."""

    budget_bytes: int
    resident_bytes: int
    reserved_bytes: int
    resident_units: int
    hits: int
    misses: int
    loads: int
    evictions: int
    failures: int
    bytes_read: int
    load_s: float
    prefetch_useful_bytes: int
    prefetch_wasted_bytes: int


@dataclass(frozen=True, kw_only=True)
class EngineStatistics:
    """Sequences running and requests waiting now; steps and tokens since the server started; KV cache in bytes.

    `prefix_*` is of prompts whose beginning was known: how many, the tokens they saved below the experts and from
    their first layer on, and the bytes that are kept.
    """

    running: int
    waiting: int
    steps: int
    tokens: int
    kv_bytes_reserved: int
    stall_s: float
    prefix_hits: int = 0
    prefix_base_tokens: int = 0
    prefix_adapted_tokens: int = 0
    prefix_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a server serves and how it is doing; `base_digest` is a SHA-256 in hexadecimal."""

    base_name: str
    base_digest: str
    generation: int
    tasks: tuple[str, ...]
    memory: MemoryStatistics
    engine: EngineStatistics
