"""Where things lie on the user's machine.

It does not know what is kept there.
Read first: this is the one place that reads the environment: `GREENROOM_CACHE` and `GREENROOM_TOKEN`.
"""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "GREENROOM_CACHE"
TOKEN_VARIABLE = "GREENROOM_TOKEN"  # noqa: S105 - a name


def cache_folder() -> Path:
    """Folder of downloaded and converted bases: `$GREENROOM_CACHE`, else `~/.cache/greenroom`; it need not exist."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "greenroom"


def secret_token() -> str | None:
    """The bearer token in `$GREENROOM_TOKEN`; None where there is none."""
    return os.environ.get(TOKEN_VARIABLE)
