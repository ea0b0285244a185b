"""The administrator's client: `AdminClient`, for a token with the scope `admin`.

It knows nothing of prompts (`greenroom.client`) or status details (`greenroom.client_errors`).
Read first: what changes a generation names the one that it expects; `AbortedError` says that somebody was first.

    with AdminClient("localhost:50051", token="...") as admin:
        admin.pin("orders")
        admin.rollback(expected=7, to=5)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from greenroom.channel import DEFAULT_TIMEOUT_S, CallSettings, Tls, open_channel
from greenroom.client_errors import translated
from greenroom.pb.greenroom.v1 import admin_pb2 as pb
from greenroom.pb.greenroom.v1 import admin_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Self

What = Literal["generation", "loaded", "evicted", "quarantined", "released"]


@dataclass(frozen=True, kw_only=True)
class TaskStatus:
    """One task, and where its own expert set stands; fields as in `admin.proto`.

    `digest` is empty where the task brought no experts; `quarantine_reason` is None where there is no quarantine.
    """

    task: str
    digest: str
    set_bytes: int
    num_visible: int
    units: int
    units_ready: int
    units_loading: int
    units_failed: int
    resident_bytes: int
    references: int
    pinned: bool
    quarantine_reason: str | None


@dataclass(frozen=True, kw_only=True)
class AdminEvent:
    """Something that was seen: `generation` where `what` is "generation", else `task`."""

    what: What
    generation: int | None = None
    task: TaskStatus | None = None


class AdminClient:
    """Blocking client; safe to share between threads; a context manager; arguments as `greenroom.Client`."""

    def __init__(
        self, target: str, *, timeout_s: float = DEFAULT_TIMEOUT_S, token: str | None = None, tls: Tls | None = None
    ) -> None:
        self._settings = CallSettings(timeout_s=timeout_s, token=token)
        self._channel = open_channel(target, tls)
        self._stub: Any = admin_pb2_grpc.AdminStub(self._channel)  # type: ignore[no-untyped-call]

    def tasks(self) -> tuple[TaskStatus, ...]:
        """All tasks of the served generation, in the order in which they were added."""
        return tuple(_status(task) for task in self._call("ListTasks", pb.ListTasksRequest()).tasks)

    def task(self, name: str) -> TaskStatus:
        """One of them."""
        return _status(self._call("GetTask", pb.TaskRequest(task=name)))

    def prefetch(self, name: str) -> TaskStatus:
        """Begin to read a task's experts."""
        return _status(self._call("Prefetch", pb.TaskRequest(task=name)))

    def pin(self, name: str) -> TaskStatus:
        """Keep a task's experts in memory until `unpin`."""
        return _status(self._call("Pin", pb.TaskRequest(task=name)))

    def unpin(self, name: str) -> TaskStatus:
        """Let go of what `pin` kept."""
        return _status(self._call("Unpin", pb.TaskRequest(task=name)))

    def evict(self, name: str) -> int:
        """Drop a task's own experts from memory where nobody holds them; the bytes that became free."""
        return int(self._call("Evict", pb.TaskRequest(task=name)).freed_bytes)

    def publish(self, *, expected: int, generation: int) -> None:
        """Serve the newest generation of the repertoire instead of `expected`."""
        self._call("Publish", pb.PublishRequest(expected_generation=expected, generation=generation))

    def rollback(self, *, expected: int, to: int) -> int:
        """Serve a new generation with the content of an older one instead of `expected`; its number."""
        request = pb.RollbackRequest(expected_generation=expected, to_generation=to)
        return int(self._call("Rollback", request).generation)

    def watch(self, *, timeout_s: float = math.inf) -> Generator[AdminEvent, None, None]:
        """What happens, as it is seen: first how everything stands, then changes; close the iterator to end it."""
        with translated():
            call = self._stub.Watch(pb.WatchRequest(), **self._settings.arguments(timeout_s))
            try:
                for message in call:
                    yield _event(message)
            finally:
                call.cancel()

    def close(self) -> None:
        """Close the connection; idempotent."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, name: str, request: Any) -> Any:  # noqa: ANN401 - any message
        with translated():
            return getattr(self._stub, name)(request, **self._settings.arguments(None))


def _status(message: pb.TaskStatus) -> TaskStatus:
    return TaskStatus(
        task=message.task,
        digest=message.digest,
        set_bytes=message.set_bytes,
        num_visible=message.num_visible,
        units=message.units,
        units_ready=message.units_ready,
        units_loading=message.units_loading,
        units_failed=message.units_failed,
        resident_bytes=message.resident_bytes,
        references=message.references,
        pinned=message.pinned,
        quarantine_reason=message.quarantine_reason or None,
    )


def _event(message: pb.AdminEvent) -> AdminEvent:
    what: Any = message.WhichOneof("event")
    if what == "generation":
        return AdminEvent(what=what, generation=message.generation)
    return AdminEvent(what=what, task=_status(getattr(message, what)))
