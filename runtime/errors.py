"""The exception tree: one class per way to be wrong that a caller can act on.

It knows nothing of gRPC, HTTP or torch: `runtime.service.status` maps these classes to wire statuses along the MRO.
Read first: every class has a stable `reason`, which clients may match on; the message is for people.

    GreenroomError
    |- InvalidInputError              a field of a request or option has a value we cannot take
    |- NotFoundError
    |  |- UnknownTaskError
    |  |- NoTaskNearError             the locator found no task near enough, and the caller wants nothing else
    |  |- UnknownModelError
    |  `- UnknownBaseError
    |- RepertoireError                what lies on disk is not what it says it is
    |  |- NotARepertoireError         no HEAD, or no such generation
    |  |- UnknownSchemaError          written by a version we do not know
    |  |- ManifestError               a manifest field is missing, unknown or wrong
    |  |- BlobMissingError            a blob that a manifest names is not there
    |  |- BlobTruncatedError          a blob ends before the bytes that a manifest names
    |  |- DigestMismatchError         bytes differ from their SHA-256
    |  |- TensorMismatchError         a tensor is missing, unexpected, or of another shape or dtype
    |  |- UnboundExpertError          an expert that updates no linear of its layer
    |  |- RankLimitError              an expert of a higher rank than the engine takes
    |  |- NonFiniteError              a weight is NaN or infinite
    |  |- BaseMismatchError           made for another base model
    |  |- SignatureError              a manifest is not signed as the reader demands
    |  `- PathEscapeError             a name that would leave the repertoire's folder
    |- GenerationMismatchError        somebody else published first
    |- TaskInUseError                 a task cannot go, since others depend on its experts
    |- ExhaustedError
    |  |- QueueFullError
    |  |- NoRoomError                 a byte budget that running requests hold now
    |  |- QuotaError                  a tenant has used up what it may have for now
    |  `- BudgetError                 a byte budget that can never hold what is asked
    |- UnauthenticatedError           no token, or one that nobody gave out
    |- PermissionDeniedError          a token whose scope or tenant does not cover the call
    |- UnavailableError               starting or draining
    |- DeadlineError
    |- CancelledError
    |- DataError                      a training or batch row we cannot use
    |- UnsupportedDeviceError         this machine's GPU, driver or libraries cannot do what is asked
    `- ExportMismatchError            an exported artefact does not compute what torch computes
"""

from __future__ import annotations

from typing import ClassVar


class GreenroomError(Exception):
    """Root of all errors that this project raises on purpose."""

    reason: ClassVar[str] = "INTERNAL"


class InvalidInputError(GreenroomError):
    """A field holds a value that cannot be used.

    Args:
        field: name of the field as the caller knows it.
        value: the offending value; shortened in the message.
        problem: what is wrong and what would be right.
    """

    reason = "INVALID_FIELD"

    def __init__(self, field: str, value: object, problem: str) -> None:
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"{field}={shown}: {problem}")
        self.field = field
        self.problem = problem


class NotFoundError(GreenroomError):
    """Something named by the caller does not exist."""

    reason = "NOT_FOUND"


class UnknownTaskError(NotFoundError):
    """A task name that the current generation does not hold."""

    reason = "UNKNOWN_TASK"


class UnknownModelError(NotFoundError):
    """A model, as clients of foreign protocols name it, that is not served, or not in this version."""

    reason = "UNKNOWN_MODEL"


class NoTaskNearError(NotFoundError):
    """No task is near enough to a prompt whose caller wants no answer without one."""

    reason = "NO_TASK_NEAR"


class UnknownBaseError(NotFoundError):
    """A base model that is neither a known name nor a folder."""

    reason = "UNKNOWN_BASE"


class RepertoireError(GreenroomError):
    """What lies on disk is not what it says it is."""

    reason = "REPERTOIRE_INVALID"


class NotARepertoireError(RepertoireError):
    """The folder has no HEAD, or not the generation that was asked for."""

    reason = "NOT_A_REPERTOIRE"


class UnknownSchemaError(RepertoireError):
    """A manifest of a schema version that this code does not read."""

    reason = "UNKNOWN_SCHEMA"


class ManifestError(RepertoireError):
    """A manifest is not JSON, or a field is missing, unknown or out of range."""

    reason = "MANIFEST_INVALID"


class BlobMissingError(RepertoireError):
    """A blob that a manifest names is not on disk."""

    reason = "BLOB_MISSING"


class BlobTruncatedError(RepertoireError):
    """A blob ends before the bytes that the manifest names."""

    reason = "BLOB_TRUNCATED"


class DigestMismatchError(RepertoireError):
    """Bytes whose SHA-256 differs from the one that names them."""

    reason = "DIGEST_MISMATCH"


class TensorMismatchError(RepertoireError):
    """A tensor that is missing, unexpected, or of another shape or dtype than declared."""

    reason = "TENSOR_MISMATCH"


class UnboundExpertError(RepertoireError):
    """An expert that updates no linear of its layer."""

    reason = "NO_MODULE_BOUND"


class RankLimitError(RepertoireError):
    """An expert of a higher rank than the engine takes."""

    reason = "RANK_OVER_LIMIT"


class NonFiniteError(RepertoireError):
    """A weight that is NaN or infinite."""

    reason = "NON_FINITE_WEIGHT"


class BaseMismatchError(RepertoireError):
    """A repertoire, or an expert, that was made for another base model."""

    reason = "BASE_MISMATCH"


class SignatureError(RepertoireError):
    """A manifest is not signed, or not by a key that is trusted, or its signature is wrong."""

    reason = "SIGNATURE_INVALID"


class PathEscapeError(RepertoireError):
    """A name that would leave the repertoire's folder."""

    reason = "PATH_ESCAPE"


class GenerationMismatchError(GreenroomError):
    """The current generation is not the one the writer expected."""

    reason = "GENERATION_MISMATCH"


class TaskInUseError(GreenroomError):
    """A task cannot be removed, because routers of other tasks see its experts; the message names them."""

    reason = "TASK_IN_USE"


class ExhaustedError(GreenroomError):
    """Something finite is used up; trying later may help."""

    reason = "EXHAUSTED"


class QueueFullError(ExhaustedError):
    """The waiting queue holds as many requests as it may."""

    reason = "QUEUE_FULL"


class QuotaError(ExhaustedError):
    """A tenant has used up what it may have for now.

    Args:
        message: which limit.
        retry_after_s: seconds after which trying again can help.
    """

    reason = "QUOTA_EXCEEDED"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoRoomError(ExhaustedError):
    """A byte budget that would do, and that running requests hold now."""

    reason = "NO_ROOM_NOW"


class BudgetError(ExhaustedError):
    """A byte budget that could not hold the request even if it were empty."""

    reason = "BUDGET_TOO_SMALL"


class UnauthenticatedError(GreenroomError):
    """The call carries no token, or one that nobody gave out."""

    reason = "UNAUTHENTICATED"


class PermissionDeniedError(GreenroomError):
    """The token is known, but its scope or tenant does not cover the call."""

    reason = "PERMISSION_DENIED"


class UnavailableError(GreenroomError):
    """The runtime is starting, draining or closed."""

    reason = "UNAVAILABLE"


class DeadlineError(GreenroomError):
    """The deadline passed before the answer was complete."""

    reason = "DEADLINE_EXCEEDED"


class CancelledError(GreenroomError):
    """The caller cancelled the request."""

    reason = "CANCELLED"


class DataError(GreenroomError):
    """A row of a data file that cannot be used.

    Args:
        source: file or dataset.
        line: line number from 1, or 0 where the whole file is meant.
        problem: which field is wrong, its value, and what would be right.
    """

    reason = "DATA_INVALID"

    def __init__(self, source: str, line: int, problem: str) -> None:
        super().__init__(f"{source}:{line}: {problem}" if line else f"{source}: {problem}")
        self.line = line
        self.problem = problem


class UnsupportedDeviceError(GreenroomError):
    """This machine's GPU, driver or libraries cannot do what is asked; the message names what is missing."""

    reason = "UNSUPPORTED_DEVICE"


class ExportMismatchError(GreenroomError):
    """An exported artefact does not compute what torch computes."""

    reason = "EXPORT_MISMATCH"
