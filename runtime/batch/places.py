"""Files behind paths and `fsspec` URLs, written whole or not at all.

It knows nothing of rows.
Read first: a local file appears by a rename. Elsewhere a file is made here and put in one call, which object stores
show only when it is complete.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec

from runtime.errors import DataError, InvalidInputError
from runtime.model.durable import sync_folder

_PIECE = 1 << 20


class Place:
    """One file or folder.

    Args:
        url: a path, or an `fsspec` URL such as s3://bucket/name.

    Raises:
        InvalidInputError: no file system is known for it.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") or "/"
        try:
            self._system, self._path = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError, OSError) as error:
            raise InvalidInputError("url", url, f"no file system for it: {error}") from error
        self.is_local = getattr(self._system, "protocol", ()) in {"file", ("file", "local")}

    def __truediv__(self, name: str) -> Place:
        return Place(f"{self.url}/{name}")

    def beside(self, suffix: str) -> Place:
        """The same name with something after it."""
        return Place(self.url + suffix)

    @property
    def parent_exists(self) -> bool:
        """Whether a file can be made here; other than local file systems make their folders as they go."""
        return not self.is_local or Path(self._path).parent.is_dir()

    def is_file(self) -> bool:
        """Whether a file is here."""
        return bool(self._system.isfile(self._path))

    def is_folder(self) -> bool:
        """Whether a folder is here."""
        return bool(self._system.isdir(self._path))

    def names(self) -> list[str]:
        """Names of the files in this folder, sorted; none where it is not there."""
        self._system.invalidate_cache()
        if not self.is_folder():
            return []
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in self._system.ls(self._path, detail=False))

    @contextmanager
    def reading(self) -> Iterator[IO[bytes]]:
        """The file, open.

        Raises:
            DataError: it cannot be read.
        """
        try:
            with self._system.open(self._path, "rb") as file:
                yield file
        except OSError as error:
            raise DataError(self.url, 0, f"cannot be read: {error.strerror or error}") from error

    def read(self) -> bytes:
        """All of the file."""
        with self.reading() as file:
            return bytes(file.read())

    def sha256(self) -> str:
        """Of the file's bytes."""
        digest = hashlib.sha256()
        with self.reading() as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
        return digest.hexdigest()

    def write(self, data: bytes) -> None:
        """Replace the file as a whole."""
        with self.replacing() as file:
            file.write(data)

    @contextmanager
    def replacing(self) -> Iterator[IO[Any]]:
        """A binary file that takes this place when the block ends well, and vanishes otherwise."""
        folder = Path(self._path).parent if self.is_local else Path(tempfile.gettempdir())
        if self.is_local:
            folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".partial-", dir=folder)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if self.is_local:
                temporary.chmod(0o666 & ~_umask())
                temporary.replace(self._path)
                sync_folder(folder)
            else:
                self._system.makedirs(self._system._parent(self._path), exist_ok=True)  # noqa: SLF001 - fsspec has no other
                self._system.put_file(name, self._path)
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the file, or the folder with all that it holds; nothing happens where nothing is."""
        if self._system.exists(self._path):
            self._system.rm(self._path, recursive=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
