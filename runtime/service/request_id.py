"""The name of a request, from the client or made here.

It knows nothing of the engine.
Read first: the message's own `request_id` wins over the header `x-request-id`; without either a fresh one is made.
"""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from runtime.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable

HEADER = "x-request-id"
PATTERN = r"[A-Za-z0-9._:-]{1,128}"

REQUEST_ID: ContextVar[str] = ContextVar("greenroom_request_id")
"""Set by the interceptor for the task that handles one call."""

_PATTERN = re.compile(PATTERN)


def new_request_id() -> str:
    """A name nobody else has."""
    return uuid.uuid4().hex


def chosen_request_id(message: Any, metadata: Iterable[tuple[str, str | bytes]]) -> str | None:  # noqa: ANN401
    """The client's name for its request, or None.

    Args:
        message: any request message, with or without a field `request_id`.
        metadata: the call's headers.

    Raises:
        InvalidInputError: the name does not match `PATTERN`.
    """
    field, chosen = "request_id", getattr(message, "request_id", "")
    if not chosen:
        field, chosen = HEADER, next((value for key, value in metadata if key == HEADER), "")
    if not chosen:
        return None
    if not isinstance(chosen, str) or not _PATTERN.fullmatch(chosen):
        raise InvalidInputError(field, chosen, f"a request id matches {PATTERN}")
    return chosen
