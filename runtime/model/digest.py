"""SHA-256 of files and streams, in pieces that fit into memory.

It knows nothing of what the bytes mean.
Read first: digests are written as 64 hexadecimal digits, lower case.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

CHUNK_BYTES = 1 << 20


def chunks(stream: BinaryIO) -> Iterator[bytes]:
    """Yield what is left of a stream in pieces of at most `CHUNK_BYTES`."""
    while chunk := stream.read(CHUNK_BYTES):
        yield chunk


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in chunks(file):
            hasher.update(chunk)
    return hasher.hexdigest()
