"""Sizes and limits of an engine.

It knows nothing of the machine; the CLI turns flags into these.
Read first: budgets are bytes, and both are hard.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from runtime.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """See each field.

    Args:
        expert_budget_bytes: expert tensors in host memory.
        kv_budget_bytes: keys and values that running sequences may come to hold.
        max_running: sequences that run at once; each has a KV slot.
        max_waiting: requests accepted but not running; more are refused.
        max_context: tokens of prompt and answer together.
        max_step_tokens: tokens of one step; long prompts are split into chunks of at most this.
        max_passes: how often a waiting request may be passed by later, smaller ones.
        num_loaders: threads that read experts.

    Raises:
        InvalidInputError: a value below 1.
    """

    expert_budget_bytes: int = 256 << 20
    kv_budget_bytes: int = 1 << 30
    max_running: int = 16
    max_waiting: int = 1024
    max_context: int = 2048
    max_step_tokens: int = 512
    max_passes: int = 32
    num_loaders: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise InvalidInputError(field.name, value, "must be at least 1")
