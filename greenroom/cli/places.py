"""Where things lie on the user's machine.

It does not know what is kept there.
Read first: this is the one place that reads `GREENROOM_CACHE`.
"""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "GREENROOM_CACHE"


def cache_folder() -> Path:
    """Folder of downloaded and converted bases: `$GREENROOM_CACHE`, else `~/.cache/greenroom`; it need not exist."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "greenroom"
