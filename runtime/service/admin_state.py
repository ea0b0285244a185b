"""How tasks stand on a server, and what changed between two looks.

It knows nothing of calls.
Read first: a task's state is that of its own expert set. A task that brought none is never loaded or evicted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from greenroom.pb.greenroom.v1 import admin_pb2 as pb

if TYPE_CHECKING:
    from runtime.engine.engine import Engine

Look = tuple[int, dict[str, pb.TaskStatus]]
"""The generation that is served, and every task of it."""


def statuses(engine: Engine) -> Look:
    """How everything stands now."""
    manifest = engine.generation.manifest
    residents = {row.digest: row for row in engine.memory.residency()}
    sets = {entry.digest: entry for entry in manifest.experts}
    tasks = {}
    for task in manifest.tasks:
        status = tasks[task.name] = pb.TaskStatus(task=task.name, num_visible=len(task.router.visible))
        if task.experts is None:
            continue
        status.digest = task.experts
        status.set_bytes = sets[task.experts].bytes
        status.units = len(sets[task.experts].units)
        row = residents.get(task.experts)
        if row is None:
            continue
        states = [state.value for state in row.units.values()]
        status.units_ready = states.count("ready")
        status.units_loading = states.count("loading")
        status.units_failed = states.count("failed")
        status.resident_bytes = row.bytes
        status.references = row.references
        status.pinned = row.pinned
        status.quarantine_reason = row.error or ""
    return manifest.generation, tasks


def status_of(engine: Engine, task: str) -> pb.TaskStatus:
    """How one task stands now; as if it had no experts where it went with its generation."""
    return statuses(engine)[1].get(task) or pb.TaskStatus(task=task)


def changes(before: Look, now: Look) -> Iterator[pb.AdminEvent]:
    """What happened between two looks; what came and went between them is not seen."""
    if now[0] != before[0]:
        yield pb.AdminEvent(generation=now[0])
    for name, task in now[1].items():
        then = before[1].get(name) or pb.TaskStatus()
        if task.units_failed and not then.units_failed:
            yield pb.AdminEvent(quarantined=task)
        if then.units_failed and not task.units_failed:
            yield pb.AdminEvent(released=task)
        if _whole(task) and not _whole(then):
            yield pb.AdminEvent(loaded=task)
        if _whole(then) and not _whole(task):
            yield pb.AdminEvent(evicted=task)


def _whole(task: pb.TaskStatus) -> bool:
    return 0 < task.units == task.units_ready
