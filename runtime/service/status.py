"""One table from our exception classes to gRPC statuses, with rich details.

It knows nothing of requests or servers.
Read first: the table is looked up along the exception's MRO, so a new subclass has a status at once; what is not in the
table is a bug, and the client is told nothing but that. Texts that may name files stay in the server's log.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from runtime import errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from google.protobuf.message import Message

DOMAIN = "greenroom"
DETAILS_KEY = "grpc-status-details-bin"
RETRY_AFTER_S = 1.0
MAX_TEXT = 1000
"""Characters of a status message; gRPC clients refuse headers of more than 8 KiB."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one class of exceptions looks on the wire.

    Args:
        code: the gRPC status code.
        text: shown to clients instead of the exception's own text; None shows that.
        retry_after_s: seconds after which trying again can help; None if it cannot.
    """

    code: grpc.StatusCode
    text: str | None = None
    retry_after_s: float | None = None


BUG = Rule(code=grpc.StatusCode.INTERNAL, text="internal error; the server's log has the request id")

RULES: Mapping[type[BaseException], Rule] = MappingProxyType(
    {
        errors.InvalidInputError: Rule(code=grpc.StatusCode.INVALID_ARGUMENT),
        errors.NotFoundError: Rule(code=grpc.StatusCode.NOT_FOUND),
        errors.RepertoireError: Rule(
            code=grpc.StatusCode.FAILED_PRECONDITION,
            text="the repertoire cannot serve this request; the server's log says why",
        ),
        errors.GenerationMismatchError: Rule(code=grpc.StatusCode.ABORTED),
        errors.TaskInUseError: Rule(code=grpc.StatusCode.FAILED_PRECONDITION),
        errors.ExhaustedError: Rule(code=grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_s=RETRY_AFTER_S),
        # What cannot fit into an empty budget will not fit later.
        errors.BudgetError: Rule(code=grpc.StatusCode.RESOURCE_EXHAUSTED),
        errors.UnauthenticatedError: Rule(code=grpc.StatusCode.UNAUTHENTICATED),
        errors.PermissionDeniedError: Rule(code=grpc.StatusCode.PERMISSION_DENIED),
        errors.UnavailableError: Rule(code=grpc.StatusCode.UNAVAILABLE),
        errors.DeadlineError: Rule(code=grpc.StatusCode.DEADLINE_EXCEEDED),
        errors.CancelledError: Rule(code=grpc.StatusCode.CANCELLED),
    }
)


def rule_for(error: BaseException) -> Rule:
    """The rule of the nearest class along the MRO; `BUG` if there is none."""
    return next((RULES[cls] for cls in type(error).__mro__ if cls in RULES), BUG)


def retry_after(error: BaseException) -> float | None:
    """Seconds after which trying again can help; None if it cannot."""
    return error.retry_after_s if isinstance(error, errors.QuotaError) else rule_for(error).retry_after_s


def rich_status(error: BaseException, request_id: str) -> status_pb2.Status:
    """What a client is told: code, text, ErrorInfo, RequestInfo, and where they apply BadRequest and RetryInfo."""
    rule = rule_for(error)
    expected = isinstance(error, errors.GreenroomError) and rule is not BUG
    details: list[Message] = [
        error_details_pb2.ErrorInfo(
            reason=error.reason if expected else errors.GreenroomError.reason,  # type: ignore[attr-defined]
            domain=DOMAIN,
        ),
        error_details_pb2.RequestInfo(request_id=request_id),
    ]
    if isinstance(error, errors.InvalidInputError):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.problem)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    retry_after_s = retry_after(error)
    if retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(math.ceil(retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=rule.code.value[0], message=(rule.text or str(error))[:MAX_TEXT])
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status
