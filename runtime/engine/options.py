"""Sizes and limits of an engine.

It knows nothing of the machine; the CLI turns flags into these.
Read first: budgets are bytes, and both are hard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from runtime.errors import InvalidInputError
from runtime.memory.eviction import EvictionName

Policy = Literal["fcfs", "locality", "fair"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """See each field.

    Args:
        expert_budget_bytes: expert and router tensors in host memory.
        device_budget_bytes: expert tensors on a device; on a CPU there is no second copy, and it counts for nothing.
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
        max_rank: experts of a higher rank are refused.
        tenant_floors: tenant -> bytes of its experts that the traffic of others does not evict.

    Raises:
        InvalidInputError: a number below 1, an unknown policy or eviction, or floors that leave nothing of the budget.
    """

    expert_budget_bytes: int = 256 << 20
    device_budget_bytes: int = 1 << 30
    kv_budget_bytes: int = 1 << 30
    prefix_budget_bytes: int = 64 << 20
    max_running: int = 16
    max_waiting: int = 1024
    max_context: int = 2048
    max_step_tokens: int = 512
    max_passes: int = 32
    num_loaders: int = 2
    max_draft: int = 0
    prefetch: bool = True
    policy: Policy = "fcfs"
    eviction: EvictionName = "lru"
    max_rank: int = 512
    tenant_floors: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, choices in (("policy", get_args(Policy)), ("eviction", get_args(EvictionName))):
            if getattr(self, name) not in choices:
                raise InvalidInputError(name, getattr(self, name), f"is one of {', '.join(choices)}")
        for option in fields(self):
            value = getattr(self, option.name)
            least = 0 if option.name in {"max_draft", "prefix_budget_bytes"} else 1
            if type(value) is int and value < least:
                raise InvalidInputError(option.name, value, f"must be at least {least}")
        for tenant, floor in self.tenant_floors.items():
            if floor < 1:
                raise InvalidInputError(f"tenant_floors[{tenant}]", floor, "must be at least 1")
        if sum(self.tenant_floors.values()) >= self.expert_budget_bytes:
            raise InvalidInputError("tenant_floors", dict(self.tenant_floors), "must leave some of the expert budget")
