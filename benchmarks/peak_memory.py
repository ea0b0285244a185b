"""How much memory a process has had at most.

It does not know what for. Read first: it imports nothing large, so that it can be asked about a process's imports.
"""

from __future__ import annotations

import os
from pathlib import Path


def peak_mb(process: int | None = None) -> float:
    """The largest resident set that a process (None: this one) has had; `ru_maxrss` begins with that of its parent."""
    lines = Path(f"/proc/{process or os.getpid()}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
