"""Errors as people at a terminal see them: one line and an exit code.

It knows nothing of commands.
Read first: exit code 2 means "what you typed cannot be used", 1 means everything else; a traceback only with `--debug`.
"""

from greenroom.client_errors import GreenroomClientError, InvalidRequestError
from runtime.errors import GreenroomError, InvalidInputError

EXIT_FAILED = 1
EXIT_INVALID = 2


def error_line(error: Exception) -> str:
    """What went wrong, in one line."""
    match error:
        case GreenroomClientError():
            where = f" (request {error.request_id})" if error.request_id else ""
            text = f"{error.reason}: {error.message}{where}"
        case GreenroomError() | OSError():
            text = str(error) or type(error).__name__
        case _:
            text = f"unexpected {type(error).__name__}: {error} (--debug shows where)"
    return " ".join(text.split())


def exit_code(error: Exception) -> int:
    """`EXIT_INVALID` for a value that cannot be used, else `EXIT_FAILED`."""
    return EXIT_INVALID if isinstance(error, InvalidInputError | InvalidRequestError) else EXIT_FAILED
