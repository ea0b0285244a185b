"""Adopt a PEFT LoRA adapter: it becomes a task with an expert set, an Arrow router and a locator entry.

It does not know how adapters look on disk (`training.peft_adapter`); nothing is trained but the locator entry.
Read first: by default the task sees its own experts alone, each with weight 1, and computes what PEFT computes with the
adapter; together with other tasks' sets, Arrow chooses among them token by token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from runtime.errors import InvalidInputError
from runtime.model.base import BaseModel
from runtime.model.expert import Expert, pack_expert_set
from runtime.model.generation import base_ref
from runtime.model.manifest import ExpertSet, Manifest
from runtime.model.repertoire import Repertoire
from runtime.model.routers import router_tensor_name
from runtime.model.signature import Signer
from training.arrow import arrow_routers
from training.config import TrainingConfig
from training.peft_adapter import Adapter
from training.publish import NewTask, publish_task, stand_on


def adopt(
    repertoire: Repertoire,
    base: BaseModel,
    adapter: Adapter,
    *,
    name: str,
    samples: Sequence[str],
    beside: Sequence[str] = (),
    top_k: int = 2,
    config: TrainingConfig | None = None,
    signer: Signer | None = None,
) -> Manifest:
    """Publish a generation that holds the adapter as the task `name`.

    Args:
        repertoire: may be empty; its first layer is then the lowest that the adapter updates.
        base: the frozen base that the adapter was trained on.
        adapter: as read.
        name: of the task.
        samples: inputs of the task, for its locator entry; without any, the task is never located, only pinned.
        beside: tasks whose own expert sets the router may choose as well.
        top_k: K, where there are others to choose from.
        config: the locator's fields and the seed; None for the defaults.
        signer: signs the new generation; None leaves it unsigned.

    Raises:
        InvalidInputError: the adapter updates layers below the repertoire's first, the name is taken, or a task in
            `beside` has no experts or gives Arrow no direction.
        UnknownTaskError: no such task in `beside`.
        BaseMismatchError: the repertoire was made for another base.
        GenerationMismatchError: somebody else published meanwhile.
        RepertoireError: the repertoire cannot be read.
    """
    lowest = min(adapter.experts)
    config = dataclasses.replace(config or TrainingConfig(), first_layer=lowest if repertoire.head() is None else None)
    ground = stand_on(repertoire, base, name, config)
    if lowest < ground.first_layer:
        problem = f"the repertoire's experts begin at layer {ground.first_layer}; make one with first_layer {lowest}"
        raise InvalidInputError("adapter", f"updates layer {lowest}", f"{problem} or lower, such as 0, for it")
    ref = base_ref(base.info)
    entries = [_own_set(ground.current, task) for task in dict.fromkeys(beside)]
    blob, own = pack_expert_set(adapter.experts, task=name, dtype=adapter.dtype, base=ref)
    sets: dict[str, dict[int, Expert]] = {
        entry.task: {unit.layer: repertoire.read_unit(entry, unit, ref) for unit in entry.units} for entry in entries
    }
    routers = arrow_routers({**sets, name: dict(adapter.experts)}, ref.width)
    task = NewTask(
        name=name,
        prompts=[ground.template.encode(base.tokenizer, text) for text in samples],
        experts=(own, blob),
        router={router_tensor_name(layer): weight for layer, weight in routers.items()},
        kind="arrow",
        top_k=min(top_k, len(entries) + 1),
        visible=(*(entry.digest for entry in entries), own.digest),
        trained_parameters=sum(expert.num_parameters for expert in adapter.experts.values()),
    )
    return publish_task(repertoire, base, ground, task, config, signer=signer)


def _own_set(current: Manifest | None, task: str) -> ExpertSet:
    if current is None:
        raise InvalidInputError("with", task, "the repertoire holds no task yet")
    digest = current.task(task).experts
    if digest is None:
        raise InvalidInputError("with", task, "it has no experts of its own")
    return current.expert_set(digest)
