"""The names that users give: tasks, groups, repertoires.

It knows nothing of what is named.
Read first: a name is never a path; everything that becomes part of one passes through here.
"""

from __future__ import annotations

import re

from runtime.errors import InvalidInputError

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,127}"
_NAME = re.compile(NAME_PATTERN)


def check_name(field: str, name: str) -> str:
    """Return `name` if it matches `[a-z0-9][a-z0-9._-]{0,127}`.

    Raises:
        InvalidInputError: it does not; the error carries `field`.
    """
    if not _NAME.fullmatch(name):
        raise InvalidInputError(field, name, f"a name matches {NAME_PATTERN}")
    return name
