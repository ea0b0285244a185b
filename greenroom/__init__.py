"""What applications import: the client, its results and its errors.

It knows nothing of models, and importing it imports no torch.
Read first: `Client("host:port").generate("text")` is the whole of it; everything else is an option.
"""

from greenroom.channel import Tls
from greenroom.client import AsyncClient, Client
from greenroom.client_errors import (
    AbortedError,
    CancelledError,
    DeadlineExceededError,
    ExhaustedError,
    FailedPreconditionError,
    FieldViolation,
    GreenroomClientError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from greenroom.results import (
    Answer,
    Delta,
    Description,
    Done,
    EngineStatistics,
    ExpertUse,
    MemoryStatistics,
    Routing,
    StreamEvent,
    TaskScore,
    Usage,
)

__all__ = [
    "AbortedError",
    "Answer",
    "AsyncClient",
    "CancelledError",
    "Client",
    "DeadlineExceededError",
    "Delta",
    "Description",
    "Done",
    "EngineStatistics",
    "ExhaustedError",
    "ExpertUse",
    "FailedPreconditionError",
    "FieldViolation",
    "GreenroomClientError",
    "InternalError",
    "InvalidRequestError",
    "MemoryStatistics",
    "NotFoundError",
    "PermissionDeniedError",
    "Routing",
    "StreamEvent",
    "TaskScore",
    "Tls",
    "UnauthenticatedError",
    "UnavailableError",
    "Usage",
]
