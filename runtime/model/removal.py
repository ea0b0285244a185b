"""Removal: the next generation, without a task.

It knows nothing of training; nothing that stays is rewritten, and the removed blobs go with the generations that name
them (`runtime.model.collect`).
Read first: other tasks' routers may choose the removed task's experts. Their outputs must not change, so the experts
stay as experts without a task where the caller agrees to that, and else nothing is removed.
"""

from __future__ import annotations

from runtime.errors import TaskInUseError
from runtime.model.manifest import Manifest, Task
from runtime.model.repertoire import Repertoire
from runtime.model.router_record import Group
from runtime.model.signature import Signer


def remove_task(
    repertoire: Repertoire, name: str, *, keep_experts: bool = False, signer: Signer | None = None
) -> Manifest:
    """Publish a generation that is the current one without task `name`.

    Its router and locator entry go, and its expert set unless somebody else still needs it. Every other task's entries
    stay as they are.

    Args:
        repertoire: with at least one generation.
        name: of the task.
        keep_experts: where other routers see its experts, let these stay without a task.
        signer: signs the new generation; None leaves it unsigned.

    Returns:
        the manifest of the new generation.

    Raises:
        UnknownTaskError: no such task.
        TaskInUseError: other tasks' routers see its experts, and `keep_experts` is not given; names the tasks.
        GenerationMismatchError: somebody else published meanwhile.
    """
    current = repertoire.manifest()
    task = current.task(name)
    others = tuple(other for other in current.tasks if other.name != name)
    users = [other.name for other in others if task.experts is not None and task.experts in needed_sets(other)]
    if users and not keep_experts:
        raise TaskInUseError(
            f"task {name} cannot be removed: the routers of {', '.join(users)} use its experts; keep the experts, or "
            f"remove those tasks first"
        )
    gone = {task.experts} if task.experts is not None and not users else set()
    groups = [
        Group(name=group.name, experts=left)
        for group in current.groups
        if (left := tuple(digest for digest in group.experts if digest not in gone))
    ]
    manifest = current.model_copy(
        update={
            "generation": current.generation + 1,
            "parent": current.generation,
            "experts": tuple(entry for entry in current.experts if entry.digest not in gone),
            "tasks": others,
            "groups": tuple(groups),
        }
    )
    repertoire.publish(manifest, {}, expected=current.generation, signer=signer)
    return manifest


def needed_sets(task: Task) -> frozenset[str]:
    """Digests of the expert sets without which a task is not what it was."""
    grouping = task.router.grouping
    general = {grouping.general} if grouping is not None and grouping.general is not None else set()
    return frozenset({*task.router.visible, *([task.experts] if task.experts else []), *general})
