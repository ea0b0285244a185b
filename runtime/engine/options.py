"""Sizes and limits of an engine.

It knows nothing of the machine; the CLI turns flags into these.
Read first: budgets are bytes, and both are hard.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from runtime.errors import InvalidInputError
from runtime.memory.eviction import EvictionName

Policy = Literal["fcfs", "locality", "fair"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """See each field.

    Args:
        expert_budget_bytes: expert tensors in host memory.
        kv_budget_bytes: keys and values that running sequences may come to hold.
        prefix_budget_bytes: keys and values of earlier prompts' beginnings, kept for later ones; 0 keeps none.
        max_running: sequences that run at once; each has a KV slot.
        max_waiting: requests accepted but not running; more are refused.
        max_context: tokens of prompt and answer together.
        max_step_tokens: tokens of one step; long prompts are split into chunks of at most this.
        max_passes: how often a waiting request may be passed by later, smaller ones.
        num_loaders: threads that read experts.
        max_draft: tokens that are tried ahead of one sequence in a step; 0 tries none; see `runtime.engine.drafting`.
        prefetch: guess a prompt's task on arrival and start to read its experts before it is located.
        policy: which waiting sequence is tried first; see `runtime.engine.scheduler.Scheduler`.
        eviction: which experts go first: "lru" or "gdsf" (frequency, size, load time).

    Raises:
        InvalidInputError: a number below 1, an unknown policy or eviction.
    """

    expert_budget_bytes: int = 256 << 20
    kv_budget_bytes: int = 1 << 30
    prefix_budget_bytes: int = 64 << 20
    max_running: int = 16
    max_waiting: int = 1024
    max_context: int = 2048
    max_step_tokens: int = 512
    max_passes: int = 32
    num_loaders: int = 1
    max_draft: int = 0
    prefetch: bool = True
    policy: Policy = "fcfs"
    eviction: EvictionName = "lru"

    def __post_init__(self) -> None:
        for name, choices in (("policy", get_args(Policy)), ("eviction", get_args(EvictionName))):
            if getattr(self, name) not in choices:
                raise InvalidInputError(name, getattr(self, name), f"is one of {', '.join(choices)}")
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in {"max_draft", "prefix_budget_bytes"} else 1
            if type(value) is int and value < least:
                raise InvalidInputError(field.name, value, f"must be at least {least}")
