"""The client's exception tree, and how a gRPC status becomes one of it.

It knows nothing of the server's classes: only status codes and the rich details on the wire.
Read first: catch by class (what to do), match on `reason` (what exactly happened), show `message` (for people).

    GreenroomClientError
    |- InvalidRequestError        a field holds a value that cannot be used; see `field_violations`
    |- NotFoundError              no such task
    |- FailedPreconditionError    the experts on the server cannot answer this
    |- ExhaustedError             queue full or a budget too small; `retry_after_s` says when to try again, if ever
    |- UnavailableError           not reachable, starting or draining; another server may answer
    |- DeadlineExceededError
    |- CancelledError             cancelled by the caller
    |- AbortedError               somebody else was first
    |- UnauthenticatedError       no token, or an unknown one
    |- PermissionDeniedError      the token's scope does not cover this
    `- InternalError              a bug in the server; its log has the request id
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import grpc
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

DETAILS_KEY = "grpc-status-details-bin"
REQUEST_ID_KEY = "x-request-id"


@dataclass(frozen=True)
class FieldViolation:
    """One field of the request that was refused: its path on the wire and what would be right."""

    field: str
    problem: str


class GreenroomClientError(Exception):
    """Root of all errors that the client raises for a call.

    Args:
        message: for people.
        code: the gRPC status code.
        reason: stable, upper case; the code's name where the server gave none.
        request_id: names the request in the server's logs; empty if it never got there.
        retry_after_s: seconds after which trying again can help; None if the server did not say.
        field_violations: the refused fields.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode,
        reason: str,
        request_id: str = "",
        retry_after_s: float | None = None,
        field_violations: tuple[FieldViolation, ...] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.request_id = request_id
        self.retry_after_s = retry_after_s
        self.field_violations = field_violations


class InvalidRequestError(GreenroomClientError):
    """A field of the request holds a value that cannot be used."""


class NotFoundError(GreenroomClientError):
    """Something that the request names does not exist."""


class FailedPreconditionError(GreenroomClientError):
    """The server's experts cannot answer this: quarantined, for another base, or damaged."""


class ExhaustedError(GreenroomClientError):
    """Something finite is used up."""


class UnavailableError(GreenroomClientError):
    """The server cannot be reached, is starting, is draining, or went away in mid-answer."""


class DeadlineExceededError(GreenroomClientError):
    """The timeout passed before the answer was complete."""


class CancelledError(GreenroomClientError):
    """The request was cancelled."""


class AbortedError(GreenroomClientError):
    """The state that the request builds on is no longer the current one."""


class UnauthenticatedError(GreenroomClientError):
    """No token, or one that the server does not know."""


class PermissionDeniedError(GreenroomClientError):
    """The token's scope does not cover this call."""


class InternalError(GreenroomClientError):
    """A bug in the server; its log has the request id."""


_CLASSES: dict[grpc.StatusCode, type[GreenroomClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ExhaustedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: CancelledError,
    grpc.StatusCode.ABORTED: AbortedError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.INTERNAL: InternalError,
}


class _FinishedCall(Protocol):
    """What a failed call offers, whether it came from `grpc` or `grpc.aio`."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def initial_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


@contextmanager
def translated() -> Iterator[None]:
    """Re-raise a gRPC error of the block as one of this tree; works around sync and async code alike."""
    try:
        yield
    except grpc.RpcError as error:
        raise client_error(error) from error


def client_error(error: grpc.RpcError) -> GreenroomClientError:
    """The exception of this tree that says what `error` says; the caller raises it `from` that."""
    call = cast("_FinishedCall", error)
    code = call.code()
    status = status_pb2.Status()
    for key, value in call.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            status.ParseFromString(value)
    info = error_details_pb2.ErrorInfo()
    bad = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    about = error_details_pb2.RequestInfo()
    for detail in status.details:
        for message in (info, bad, retry, about):
            detail.Unpack(message)
    return _CLASSES.get(code, GreenroomClientError)(
        call.details() or code.name,
        code=code,
        reason=info.reason or code.name,
        request_id=about.request_id or _request_id(call),
        retry_after_s=retry.retry_delay.ToMicroseconds() / 1e6 if retry.HasField("retry_delay") else None,
        field_violations=tuple(FieldViolation(item.field, item.description) for item in bad.field_violations),
    )


def _request_id(call: _FinishedCall) -> str:
    for key, value in call.initial_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str):
            return value
    return ""
