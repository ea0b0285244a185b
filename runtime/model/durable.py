"""Files that appear whole or not at all, and stay when the power goes.

It knows nothing of what it writes.
Read first: temporary file in the same folder, fsync, rename, fsync of the folder; a crash can leave a `.partial-*` file
behind and nothing else.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from runtime.model.layout import PARTIAL

OnStep = Callable[[str], None]
"""Called with a name before every step that changes the disk; lets tests die there."""


def no_step(_step: str) -> None:
    """Take no note of a step."""


def write_durably(path: Path, data: bytes, *, kind: str, on_step: OnStep = no_step) -> None:
    """Replace the file at `path` by one that holds `data`; durable on return.

    Args:
        path: its folder is made if it is not there.
        data: all of the file.
        kind: what it is, for `on_step`.
        on_step: told "write KIND", "rename KIND" and "done KIND".

    Raises:
        OSError: the disk is full, or refuses; what was at `path` is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{PARTIAL}{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            on_step(f"write {kind}")
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        on_step(f"rename {kind}")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    on_step(f"done {kind}")


def sync_folder(folder: Path) -> None:
    """Make what was renamed or removed in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
