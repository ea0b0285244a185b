"""An artefact's folder: it appears whole or not at all.

It knows nothing of what the files compute.
Read first: files are written into a hidden sibling, synced, and the sibling is renamed into place; a crash can leave
the hidden folder behind, and the next export of that target removes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from exporters.manifest import FILE_NAME, Check, ExportManifest, Facts, FileEntry, parse_export_manifest
from runtime.errors import ManifestError


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_file(path: Path, *, facts: Facts | None = None, checks: Iterable[Check] = ()) -> FileEntry:
    """The manifest's entry of a file that is no graph."""
    return FileEntry(
        name=path.name, bytes=path.stat().st_size, sha256=sha256_of(path), facts=facts or {}, checks=tuple(checks)
    )


def read_artefact(folder: Path) -> ExportManifest | None:
    """Return the manifest of a complete artefact; None where there is none, or where a file is damaged or missing."""
    try:
        manifest = parse_export_manifest((folder / FILE_NAME).read_bytes(), source=FILE_NAME)
        whole = all(sha256_of(folder / entry.name) == entry.sha256 for entry in manifest.files)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ManifestError):
        return None
    return manifest if whole else None


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder` when the block ends without an exception.

    Until then, and after an exception in the block, `folder` is what it was. Writers of several processes wait for one
    another.
    """
    exports = folder.parent.parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".partial-{folder.name}")
    replaced = folder.with_name(f".replaced-{folder.name}")
    with (exports / ".writer-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            for path in partial.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)  # some libraries write files for their owner alone
                _sync(path)
            _sync(partial)
            if folder.exists():
                folder.replace(replaced)  # a folder that is not empty cannot be renamed over
            partial.replace(folder)
            _sync(folder.parent)
            _sync(exports)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
