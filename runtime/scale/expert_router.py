"""Ray Serve's request router for replicas that hold experts: `choose_replicas` by resident tasks, then by load.

It knows nothing of prompts; the entry passes the located task as the keyword `task`.
Read first: the only file that cannot be imported without Ray. Serve asks every replica for its statistics at intervals,
keeps queue lengths, and tries the ranks that are returned here one after the other.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from runtime.scale.choice import SPREAD, Sent, choose
from runtime.scale.frames import RESIDENT


class ExpertRouter(RequestRouter):  # type: ignore[misc]  # Ray is not typed
    """See `runtime.scale.choice`."""

    def initialize_state(self, *, spread: int = SPREAD, by_task: bool = True) -> None:
        """Take the router's own settings.

        Args:
            spread: see `runtime.scale.choice.SPREAD`.
            by_task: False takes turns and looks at nothing, for comparison.
        """
        self._spread = spread
        self._by_task = by_task
        self._turn = 0
        self._sent = Sent()
        self._told: dict[str, Any] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Every candidate is a rank of its own, the one to be tried first in front."""
        named = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        task = pending_request.kwargs.get("task") if pending_request is not None else None
        if not self._by_task:
            self._turn += 1
            order = sorted(named)
            first = self._turn % max(1, len(order))
            return [[named[name]] for name in order[first:] + order[:first]]
        for name, replica in named.items():
            self._listen(name, replica.routing_stats)
        lengths = {name: self.replica_queue_len_cache.get(named[name].replica_id) or 0 for name in named}
        homes = self._sent.homes(task) | self._tellers(task, named) if task else frozenset()
        return [[named[name]] for name in choose(homes, lengths, spread=self._spread)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: Any, result: Any) -> None:  # noqa: ANN401, ARG002
        """Remember where a task went."""
        task = pending_request.kwargs.get("task")
        if task:
            self._sent.add(task, replica_id.unique_id)

    def _listen(self, name: str, told: dict[str, Any]) -> None:
        if told and told != self._told.get(name):
            self._told[name] = told
            self._sent.correct(name, told.get(RESIDENT, ()))

    def _tellers(self, task: str, named: dict[str, RunningReplica]) -> frozenset[str]:
        return frozenset(name for name in named if task in self._told.get(name, {}).get(RESIDENT, ()))
