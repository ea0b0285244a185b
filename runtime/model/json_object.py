"""A JSON file that must hold one object.

It does not know what the object means.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtime.errors import InvalidInputError


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises InvalidInputError for anything else, OSError where there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInputError(path.name, str(path), f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidInputError(path.name, value, "must be a JSON object")
    return value
