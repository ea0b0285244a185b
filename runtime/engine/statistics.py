"""What an engine says of itself: an immutable snapshot.

It knows nothing of how the figures come about.
Read first: counts run since the start; bytes and seconds are in the names.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.memory.statistics import MemoryStatistics


@dataclass(frozen=True)
class GraphCounts:
    """Of steps in which all sequences decode: replayed, run as without recording, and recordings made."""

    replays: int = 0
    fallbacks: int = 0
    captures: int = 0


@dataclass(frozen=True, kw_only=True)
class EngineStatistics:
    """A snapshot.

    Args:
        generation: what new requests get.
        generations: all that are in use, older ones by requests that began with them.
        tasks: of the current generation.
        running: sequences that hold a KV slot.
        waiting: requests that do not yet.
        steps: taken.
        tokens: generated.
        drafted_tokens: tried ahead of greedy answers.
        accepted_tokens: of these, how many were right.
        kv_bytes_reserved: what running sequences may come to fill.
        stall_s: seconds in which sequences stood before the expert layers and waited for experts.
        memory: of the expert memory.
        prefix_hits: prompts whose beginning was known from earlier ones.
        prefix_base_tokens: tokens that they did not have to compute below the experts.
        prefix_adapted_tokens: and from the experts' first layer on.
        prefix_bytes: of what is kept.
        graphs: of recorded decode steps; all 0 where none are recorded.
    """

    generation: int
    generations: tuple[int, ...]
    tasks: tuple[str, ...]
    running: int
    waiting: int
    steps: int
    tokens: int
    drafted_tokens: int
    accepted_tokens: int
    kv_bytes_reserved: int
    stall_s: float
    memory: MemoryStatistics
    prefix_hits: int = 0
    prefix_base_tokens: int = 0
    prefix_adapted_tokens: int = 0
    prefix_bytes: int = 0
    graphs: GraphCounts = GraphCounts()
