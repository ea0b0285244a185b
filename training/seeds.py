"""Seeds: one that the user chooses, and one of its own for every purpose.

It does not know what they are used for.
Read first: equal seeds must not mean equal weights everywhere, so a purpose enters every seed.
"""

from __future__ import annotations

import hashlib


def seed_for(seed: int, *purpose: str) -> int:
    """A seed of its own for every purpose (task, part), so that equal seeds do not mean equal weights everywhere."""
    return int.from_bytes(hashlib.sha256("\0".join((str(seed), *purpose)).encode()).digest()[:6], "little")
