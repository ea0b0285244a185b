"""What callers of the client may ask for: prompts, and the options of each call.

It knows nothing of protobuf or connections.
Read first: an option that is left out is the server's default; one that does not exist is a TypeError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

Prompt = str | Sequence[Mapping[str, str]]
"""A text, or a chat: mappings with `role` ("system", "user", "assistant") and `content`, the last one the user's."""


class LocateOptions(TypedDict, total=False):
    """Options of every call; what is left out is the server's default.

    raw: the text is the whole prompt, without template.
    request_id: names the request, [A-Za-z0-9._:-]{1,128}; the server makes one otherwise.
    priority: of waiting requests those with the lowest are tried first, -100 to 100; tenant: in whose name.
    """

    raw: bool
    request_id: str
    priority: int
    tenant: str


class RouteOptions(LocateOptions, total=False):
    """Options of `score`, and some of `generate` and `stream`.

    task: pin this task; base_only: the plain base model.
    task_weights: task -> weight; these tasks answer together, each with its share of the weight.
    abstain_fails: NotFoundError where no task is near enough; default_task: this task then; else the base answers.
    group_bias: group -> what is added to its logit; group_mask: groups without weight; for tasks with grouped routers.
    explain: report how much each expert had to say in every layer.
    """

    task: str | None
    base_only: bool
    task_weights: Mapping[str, float]
    abstain_fails: bool
    default_task: str | None
    group_bias: Mapping[str, float]
    group_mask: Sequence[str]
    explain: bool


class GenerateOptions(RouteOptions, total=False):
    """Options of `generate` and `stream`; what is left out is the server's default.

    max_tokens, temperature (0 is greedy), top_p, top_k (0 is all), min_p, repetition_penalty, presence_penalty,
    frequency_penalty, seed, stop (strings), ignore_eos: sampling.
    n: so many answers, see `Answer.choices`; logprobs: with log-probabilities and so many alternatives.
    json_schema (a schema as text or as a mapping), regex: what the answer may be; one of them.
    """

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    n: int | None
    logprobs: int | None
    json_schema: str | Mapping[str, Any] | None
    regex: str | None
    stop: Sequence[str]
    ignore_eos: bool
