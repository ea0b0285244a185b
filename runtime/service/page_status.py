"""What the page shows of a server, as one JSON value: who is resident where, how often that hit, and what runs.

It knows nothing of HTTP.
Read first: it holds nothing of any request's content or caller; bytes and seconds are in the names.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.engine.engine import Engine
    from runtime.service.answers import Answers
    from runtime.service.models import Models

MAX_REQUESTS = 50
MAX_TASKS = 500


async def page_status(engine: Engine, models: Models, answers: Answers) -> dict[str, Any]:
    """Everything, now."""
    requests = answers.open_requests.shown(MAX_REQUESTS)
    return {
        "name": models.name,
        "ready": models.is_ready(),
        **await asyncio.to_thread(_of_engine, engine),
        "requests": requests,
    }


def _of_engine(engine: Engine) -> dict[str, Any]:
    statistics = asdict(engine.statistics())
    memory = statistics.pop("memory")
    return {"engine": statistics, "memory": memory, "tasks": _tasks(engine)}


def _tasks(engine: Engine) -> list[dict[str, Any]]:
    manifest = engine.generation.manifest
    sets = {entry.digest: entry for entry in manifest.experts}
    resident = {row.digest: row for row in engine.memory.residency()}
    shown = []
    for task in manifest.tasks[:MAX_TASKS]:
        entry, row = sets.get(task.experts or ""), resident.get(task.experts or "")
        states = {} if row is None else {layer: state.value for layer, state in row.units.items()}
        shown.append(
            {
                "name": task.name,
                "digest": task.experts,
                "disk_bytes": entry.bytes if entry is not None else 0,
                "host_bytes": row.bytes if row is not None else 0,
                "layers": [
                    {"layer": unit.layer, "state": states.get(unit.layer, "absent")}
                    for unit in (entry.units if entry is not None else ())
                ],
                "pinned": row is not None and row.pinned,
                "error": row.error if row is not None else None,
            }
        )
    return shown
