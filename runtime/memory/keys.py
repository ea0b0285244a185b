"""The identity of what memory can hold.

It knows nothing of what that is, and imports nothing, so that options can name orders of eviction without tensors.
Read first: routers lie at layer -1, below every layer with experts.
"""

from __future__ import annotations

UnitKey = tuple[str, int]
"""(digest of the expert set, layer); of routers (see `routers_name`, ROUTERS)."""

ROUTERS = -1


def routers_name(digest: str, *, generation: int, task: str) -> str:
    """The name of a task's routers: two tasks may have the same bytes, and still see other experts by them."""
    return f"{digest}@{generation}/{task}"
