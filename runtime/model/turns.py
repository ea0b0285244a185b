"""The turns of a chat: who may say what, in which order.

It knows nothing of templates or tokens (`runtime.model.chat`), and imports nothing heavy.
Read first: the user has the last word; what comes next is the assistant's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from runtime.errors import InvalidInputError

Role = Literal["system", "user", "assistant"]
MAX_MESSAGES = 256


@dataclass(frozen=True)
class Message:
    """One turn: who speaks, and what."""

    role: Role
    content: str


def check_chat(messages: Sequence[Message]) -> None:
    """Check that the assistant speaks next.

    Raises:
        InvalidInputError: too many messages, an unknown role, an empty content, a system turn that is not the first, or
            a last turn that is not the user's; the field names the message.
    """
    if len(messages) > MAX_MESSAGES:
        raise InvalidInputError("messages", len(messages), f"at most {MAX_MESSAGES} messages")
    for place, message in enumerate(messages):
        if message.role not in get_args(Role):
            raise InvalidInputError(f"messages[{place}].role", message.role, f"is one of {', '.join(get_args(Role))}")
        if message.role == "system" and place > 0:
            raise InvalidInputError(f"messages[{place}].role", message.role, "only the first can be the system's")
        if not message.content:
            raise InvalidInputError(f"messages[{place}].content", message.content, "must not be empty")
    if messages and messages[-1].role != "user":
        raise InvalidInputError(f"messages[{len(messages) - 1}].role", messages[-1].role, "the last one is the user's")
