"""What applications import: the client, its results and its errors.

It knows nothing of models, and importing it imports no torch.
Read first: `Client("host:port").generate("text")` is the whole of it; everything else is an option.
"""

from greenroom.admin_client import AdminClient, AdminEvent, TaskStatus
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
    Alternative,
    Answer,
    Choice,
    Delta,
    Description,
    Done,
    EngineStatistics,
    ExpertUse,
    LayerWeights,
    MemoryStatistics,
    Routing,
    Score,
    StreamEvent,
    TaskScore,
    TokenLogprob,
    Usage,
)

__all__ = [
    "AbortedError",
    "AdminClient",
    "AdminEvent",
    "Alternative",
    "Answer",
    "AsyncClient",
    "CancelledError",
    "Choice",
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
    "LayerWeights",
    "MemoryStatistics",
    "NotFoundError",
    "PermissionDeniedError",
    "Routing",
    "Score",
    "StreamEvent",
    "TaskScore",
    "TaskStatus",
    "Tls",
    "TokenLogprob",
    "UnauthenticatedError",
    "UnavailableError",
    "Usage",
]
