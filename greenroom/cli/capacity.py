"""What byte budgets can hold: experts of a repertoire, and tokens of a base's KV cache.

It knows nothing of engines that run; the rules are theirs.
Read first: a request needs the visible set of its task whole, so what counts is how many of those fit beside one
another, the largest first.
"""

from __future__ import annotations

from pathlib import Path

from runtime.kernels.step_kinds import WeightKind
from runtime.model.manifest import Manifest
from runtime.model.routers import router_bytes


def capacity(
    manifest: Manifest | None,
    base: Path | None,
    *,
    expert_budget_bytes: int,
    kv_budget_bytes: int,
    prefix_budget_bytes: int,
    dtype: WeightKind,
) -> dict[str, int]:
    """Figures by name; those of what is not given are left out.

    Args:
        manifest: of a generation.
        base: folder of the base.
        expert_budget_bytes: of expert memory.
        kv_budget_bytes: of KV cache.
        prefix_budget_bytes: of what is kept of earlier prompts' beginnings.
        dtype: what the base's weights are kept in.
    """
    found: dict[str, int] = {}
    if manifest is not None:
        found |= expert_capacity(manifest, expert_budget_bytes, dtype)
    if base is not None:
        found |= kv_capacity(base, kv_budget_bytes, prefix_budget_bytes, dtype)
    return found


def expert_capacity(manifest: Manifest, budget_bytes: int, dtype: WeightKind) -> dict[str, int]:
    """How many expert sets fit, and how many tasks can run at the same time, counted from the largest down.

    Experts and routers count as memory counts them. `tasks_too_large` can never run with this budget;
    `all_experts_bytes`, of experts and routers, is the budget that never evicts.
    """
    from runtime.engine.step_model import load_dtype
    from runtime.memory.kept_dtype import kept_bytes

    kept = load_dtype(dtype)
    sets = {entry.digest: sum(kept_bytes(entry, unit, kept) for unit in entry.units) for entry in manifest.experts}
    routers = {task.name: router_bytes(manifest, task) for task in manifest.tasks}
    needs = [
        {("set", seen): sets[seen] for seen in task.router.all_experts()} | {("routers", task.name): routers[task.name]}
        for task in manifest.tasks
    ]
    needs.sort(key=lambda need: -sum(need.values()))
    runnable = [need for need in needs if sum(need.values()) <= budget_bytes]
    together: dict[tuple[str, str], int] = {}
    num_together = 0
    for need in runnable:
        if sum((together | need).values()) > budget_bytes:
            break
        together |= need
        num_together += 1
    return {
        "expert_sets": len(sets),
        "all_experts_bytes": sum(sets.values()) + sum(routers.values()),
        "expert_sets_in_budget": _num_that_fit(sorted(sets.values(), reverse=True), budget_bytes),
        "tasks_running_together": num_together,
        "tasks_too_large": len(needs) - len(runnable),
    }


def kv_capacity(base: Path, budget_bytes: int, prefix_budget_bytes: int, dtype: WeightKind) -> dict[str, int]:
    """Tokens that the KV cache of a base in this folder can hold, and whole prompts' tokens that the prefix cache can.

    A token there has its keys and values of all layers and, float32 at most, the residual stream before the experts.
    """
    from transformers import AutoConfig

    from runtime.engine.kv import KVShape
    from runtime.engine.prefix import BLOCK
    from runtime.engine.step_model import load_dtype

    config = AutoConfig.from_pretrained(base, local_files_only=True).get_text_config()
    heads = config.num_attention_heads
    shape = KVShape(
        num_layers=config.num_hidden_layers,
        num_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
        context=config.max_position_embeddings,
    )
    token_bytes = shape.token_bytes(load_dtype(dtype))
    block_bytes = BLOCK * (token_bytes + 4 * config.hidden_size)
    return {
        "kv_token_bytes": token_bytes,
        "kv_tokens": budget_bytes // token_bytes,
        "prefix_tokens": prefix_budget_bytes // block_bytes * BLOCK,
    }


def _num_that_fit(sizes: list[int], budget_bytes: int) -> int:
    left, count = budget_bytes, 0
    for size in sizes:
        if size > left:
            break
        left -= size
        count += 1
    return count
