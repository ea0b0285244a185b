"""Where things lie inside a repertoire: the names of its files, relative to its root.

It knows nothing of what the files hold.
Read first: names are made here from numbers and digests alone, so nothing that a file says can lead out of the root.
"""

from __future__ import annotations

import re
from pathlib import Path

from runtime.errors import ManifestError, PathEscapeError

HEAD = "HEAD"
BLOBS = "blobs/sha256"
GENERATIONS = "generations"
PARTIAL = ".partial-"

_DIGEST = re.compile(r"[0-9a-f]{64}")
_STEM = re.compile(r"[0-9]{6}")
_HEAD = re.compile(r"[1-9][0-9]{0,5}\n")


def manifest_name(generation: int) -> str:
    """Name of a generation's manifest."""
    return f"{GENERATIONS}/{generation:06d}.json"


def signature_name(generation: int) -> str:
    """Name of the signature over a generation's manifest."""
    return f"{GENERATIONS}/{generation:06d}.sig"


def tombstone_name(generation: int) -> str:
    """Name of the file that holds the SHA-256 of a manifest that was collected."""
    return f"{GENERATIONS}/{generation:06d}.sha256"


def blob_name(digest: str) -> str:
    """Name of a blob.

    Raises:
        PathEscapeError: `digest` is not 64 hexadecimal digits.
    """
    if not is_digest(digest):
        raise PathEscapeError(f"blob {digest[:80]!r}: a digest is 64 hexadecimal digits")
    return f"{BLOBS}/{digest[:2]}/{digest}"


def is_digest(text: str) -> bool:
    """Whether a text is a SHA-256 as we write it: 64 hexadecimal digits, lower case."""
    return _DIGEST.fullmatch(text) is not None


def parse_head(data: bytes, *, source: str) -> int:
    """Return the number in the bytes of HEAD.

    Raises:
        ManifestError: they do not hold exactly one number and a newline.
    """
    text = data.decode("ascii", errors="replace")
    if not _HEAD.fullmatch(text):
        raise ManifestError(f"{source}: expected a generation number, found {text[:40]!r}")
    return int(text)


def head_bytes(generation: int) -> bytes:
    """The bytes of HEAD."""
    return f"{generation}\n".encode()


def manifest_numbers(root: Path) -> tuple[int, ...]:
    """Return the numbers of all manifests in a local repertoire, ascending; some may never have been published."""
    stems = (path.stem for path in (root / GENERATIONS).glob("*.json"))
    return tuple(sorted(int(stem) for stem in stems if _STEM.fullmatch(stem)))
