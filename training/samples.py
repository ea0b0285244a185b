"""Sample inputs of a task, for its locator entry: plain lines, or JSONL rows with `input`.

It does not know tokens or models.
Read first: the file's suffix decides; blank lines are skipped.
"""

from __future__ import annotations

import json
from pathlib import Path

from runtime.errors import DataError


def read_samples(path: Path) -> tuple[str, ...]:
    """Read the inputs of a file.

    Raises:
        DataError: the file is missing, not UTF-8 or empty, or a line of a `.jsonl` file has no text in `input`.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise DataError(str(path), 0, "there is no such file") from error
    except UnicodeDecodeError as error:
        raise DataError(str(path), 0, f"is not UTF-8: {error}") from error
    rows = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise DataError(str(path), 0, "holds no rows")
    if path.suffix != ".jsonl":
        return tuple(line for _, line in rows)
    return tuple(_input(path, number, line) for number, line in rows)


def _input(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(str(path), number, f"is not JSON: {error}") from error
    text = row.get("input") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise DataError(str(path), number, f"input={text!r}: must be a text")
    return text
