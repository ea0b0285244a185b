"""Every exception of ours has its status on the wire, with details a program can act on.

It does not know servers: `test_service.py` sees the same statuses arrive.
Read first: `TABLE` is the promise to clients, written out.
"""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2

from runtime import errors
from runtime.service.status import MAX_TEXT, rich_status, rule_for

Code = grpc.StatusCode
TABLE = [
    (errors.InvalidInputError("top_p", 2, "too large"), Code.INVALID_ARGUMENT, "INVALID_FIELD"),
    (errors.NotFoundError("x"), Code.NOT_FOUND, "NOT_FOUND"),
    (errors.UnknownTaskError("x"), Code.NOT_FOUND, "UNKNOWN_TASK"),
    (errors.RepertoireError("x"), Code.FAILED_PRECONDITION, "REPERTOIRE_INVALID"),
    (errors.BlobTruncatedError("x"), Code.FAILED_PRECONDITION, "BLOB_TRUNCATED"),
    (errors.DigestMismatchError("x"), Code.FAILED_PRECONDITION, "DIGEST_MISMATCH"),
    (errors.BaseMismatchError("x"), Code.FAILED_PRECONDITION, "BASE_MISMATCH"),
    (errors.GenerationMismatchError("x"), Code.ABORTED, "GENERATION_MISMATCH"),
    (errors.TaskInUseError("x"), Code.FAILED_PRECONDITION, "TASK_IN_USE"),
    (errors.ExhaustedError("x"), Code.RESOURCE_EXHAUSTED, "EXHAUSTED"),
    (errors.QueueFullError("x"), Code.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    (errors.BudgetError("x"), Code.RESOURCE_EXHAUSTED, "BUDGET_TOO_SMALL"),
    (errors.QuotaError("x", retry_after_s=2.5), Code.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED"),
    (errors.UnauthenticatedError("x"), Code.UNAUTHENTICATED, "UNAUTHENTICATED"),
    (errors.PermissionDeniedError("x"), Code.PERMISSION_DENIED, "PERMISSION_DENIED"),
    (errors.UnavailableError("x"), Code.UNAVAILABLE, "UNAVAILABLE"),
    (errors.DeadlineError("x"), Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    (errors.CancelledError("x"), Code.CANCELLED, "CANCELLED"),
    (errors.GreenroomError("x"), Code.INTERNAL, "INTERNAL"),
    (errors.DataError("file", 3, "x"), Code.INTERNAL, "INTERNAL"),
    (ValueError("x"), Code.INTERNAL, "INTERNAL"),
    (KeyError("x"), Code.INTERNAL, "INTERNAL"),
]


def details(error: Exception) -> dict[str, object]:
    found: dict[str, object] = {}
    for detail in rich_status(error, "r1").details:
        name = detail.TypeName().rpartition(".")[2]
        found[name] = message = getattr(error_details_pb2, name)()
        assert detail.Unpack(message)
    return found


@pytest.mark.parametrize(("error", "code", "reason"), TABLE, ids=lambda value: type(value).__name__)
def test_each_class_has_its_code_and_reason(error: Exception, code: grpc.StatusCode, reason: str) -> None:
    status = rich_status(error, "r1")
    info = details(error)["ErrorInfo"]
    assert (rule_for(error).code, status.code) == (code, code.value[0])
    assert (info.reason, info.domain) == (reason, "greenroom")


def test_every_status_names_the_request() -> None:
    for error, *_ in TABLE:
        assert details(error)["RequestInfo"].request_id == "r1"


def test_a_new_subclass_has_the_status_of_its_parent() -> None:
    class NewError(errors.QueueFullError):
        reason = "NEW"

    assert rule_for(NewError("x")).code is Code.RESOURCE_EXHAUSTED
    assert details(NewError("x"))["ErrorInfo"].reason == "NEW"


def test_an_invalid_field_is_named() -> None:
    (violation,) = details(errors.InvalidInputError("top_p", 2, "too large"))["BadRequest"].field_violations
    assert (violation.field, violation.description) == ("top_p", "too large")


def test_only_what_may_fit_later_says_when_to_try_again() -> None:
    assert details(errors.QueueFullError("x"))["RetryInfo"].retry_delay.ToMilliseconds() == 1000
    assert details(errors.QuotaError("x", retry_after_s=2.5))["RetryInfo"].retry_delay.ToMilliseconds() == 2500
    assert "RetryInfo" not in details(errors.BudgetError("x"))


def test_texts_that_may_name_files_are_not_sent() -> None:
    for error in (ValueError("/home/secret"), errors.BlobMissingError("/home/secret"), errors.DataError("/a", 1, "x")):
        assert "/" not in rich_status(error, "r1").message


def test_a_long_text_is_cut_to_what_headers_carry() -> None:
    assert len(rich_status(errors.NotFoundError("x" * 10_000), "r1").message) == MAX_TEXT
