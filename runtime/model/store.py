"""Stores: a repertoire's files in a local folder or behind any `fsspec` URL, as a transfer sees them.

It knows nothing of histories or of what should move.
Read first: a name (`runtime.model.layout`) is relative to the repertoire's root; whatever a store takes in is whole and
checked before it has its name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import fsspec
from fsspec.spec import AbstractFileSystem

from runtime.errors import BlobMissingError, DigestMismatchError, InvalidInputError, NotARepertoireError
from runtime.model.digest import chunks
from runtime.model.durable import sync_folder, write_durably
from runtime.model.layout import BLOBS, PARTIAL, blob_name, is_digest
from runtime.model.repertoire import Repertoire

OnBytes = Callable[[int], None]


class Store(Protocol):
    """A repertoire's files, wherever they lie."""

    @property
    def place(self) -> str:
        """Where it is, for people."""

    def read(self, name: str) -> bytes | None:
        """Return a small file, or None where there is none."""

    def write(self, name: str, data: bytes) -> None:
        """Write or replace a small file."""

    def blob_sizes(self) -> dict[str, int]:
        """Return digest -> bytes of every blob that is here."""

    def open_blob(self, digest: str, offset: int) -> AbstractContextManager[BinaryIO]:
        """Open a blob for reading from `offset` on.

        Raises:
            BlobMissingError: it is not here.
        """

    def receive_blob(self, digest: str, source: Store, on_bytes: OnBytes) -> int:
        """Bring a blob from `source`; it has its name only when it is whole and its digest right.

        Args:
            digest: its name.
            source: the store that has it.
            on_bytes: told the length of every piece that is here.

        Returns:
            bytes that were read from `source`.

        Raises:
            DigestMismatchError: what arrived has another digest; nothing of it is kept.
        """

    def writing(self) -> AbstractContextManager[None]:
        """Exclude other writers where the store can."""

    def holding(self, generations: Iterable[int]) -> AbstractContextManager[None]:
        """Keep those of these generations that are here from being collected, where the store can."""


def open_store(url: str, *, read_back: bool = True) -> Store:
    """Return the store at a folder's path or an `fsspec` URL.

    Args:
        url: a path is one without "://".
        read_back: see `RemoteStore`.

    Raises:
        InvalidInputError: no driver for such a URL is installed.
    """
    if "://" not in url:
        return LocalStore(Repertoire(Path(url)))
    try:
        system, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InvalidInputError("url", url, str(error)) from error
    if "file" in ((system.protocol,) if isinstance(system.protocol, str) else system.protocol):
        return LocalStore(Repertoire(Path(root)))
    return RemoteStore(system, root, read_back=read_back)


class LocalStore:
    """A folder on this machine: durable writes, a writer lock, leases; a blob that came in part is continued."""

    def __init__(self, repertoire: Repertoire) -> None:
        self._repertoire = repertoire

    @property
    def place(self) -> str:
        """See `Store`."""
        return str(self._repertoire.root)

    def read(self, name: str) -> bytes | None:
        """See `Store`."""
        try:
            return (self._repertoire.root / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """See `Store`."""
        write_durably(self._repertoire.root / name, data, kind=name)

    def blob_sizes(self) -> dict[str, int]:
        """See `Store`."""
        paths = (self._repertoire.root / BLOBS).glob("??/*")
        return {path.name: path.stat().st_size for path in paths if is_digest(path.name)}

    @contextmanager
    def open_blob(self, digest: str, offset: int) -> Iterator[BinaryIO]:
        """See `Store`."""
        try:
            file = self._repertoire.blob_path(digest).open("rb")
        except FileNotFoundError as error:
            raise BlobMissingError(f"blob {digest} is not in {self.place}") from error
        with file:
            file.seek(offset)
            yield file

    def receive_blob(self, digest: str, source: Store, on_bytes: OnBytes) -> int:
        """See `Store`; the caller has the writer lock."""
        path = self._repertoire.blob_path(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{PARTIAL}{digest}")
        hasher = hashlib.sha256()
        with partial.open("a+b") as file:
            file.seek(0)
            for chunk in chunks(file):
                hasher.update(chunk)
                on_bytes(len(chunk))
            start = file.tell()
            with source.open_blob(digest, start) as stream:
                for chunk in chunks(stream):
                    file.write(chunk)
                    hasher.update(chunk)
                    on_bytes(len(chunk))
            num_moved = file.tell() - start
            file.flush()
            os.fsync(file.fileno())
        if hasher.hexdigest() != digest:
            partial.unlink()
            raise DigestMismatchError(f"blob {digest}: what came from {source.place} has another digest")
        partial.replace(path)
        sync_folder(path.parent)
        return num_moved

    def writing(self) -> AbstractContextManager[None]:
        """See `Store`."""
        return self._repertoire.writer_lock()

    @contextmanager
    def holding(self, generations: Iterable[int]) -> Iterator[None]:
        """See `Store`."""
        with ExitStack() as leases:
            for number in generations:
                with suppress(NotARepertoireError):
                    leases.enter_context(self._repertoire.hold_generation(number))
            yield


class RemoteStore:
    """A root in an `fsspec` file system; it has no locks, so only one writer at a time is safe.

    Args:
        system: the file system.
        root: path in it.
        read_back: read every blob again after it was sent, to check what arrived.
    """

    def __init__(self, system: AbstractFileSystem, root: str, *, read_back: bool = True) -> None:
        self._system = system
        self._root = root.rstrip("/")
        self._read_back = read_back
        system.invalidate_cache()  # others may have written since this process last looked

    @property
    def place(self) -> str:
        """See `Store`."""
        return str(self._system.unstrip_protocol(self._root))

    def read(self, name: str) -> bytes | None:
        """See `Store`."""
        try:
            return bytes(self._system.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """See `Store`."""
        self._make_parent(name)
        self._system.pipe_file(self._path(name), data)

    def blob_sizes(self) -> dict[str, int]:
        """See `Store`."""
        try:
            files = self._system.find(self._path(BLOBS), detail=True)
        except FileNotFoundError:
            return {}
        names = {path.rpartition("/")[2]: int(entry["size"]) for path, entry in files.items()}
        return {name: size for name, size in names.items() if is_digest(name)}

    @contextmanager
    def open_blob(self, digest: str, offset: int) -> Iterator[BinaryIO]:
        """See `Store`."""
        try:
            file = self._system.open(self._path(blob_name(digest)), "rb")
        except FileNotFoundError as error:
            raise BlobMissingError(f"blob {digest} is not in {self.place}") from error
        with file:
            file.seek(offset)
            yield cast("BinaryIO", file)

    def receive_blob(self, digest: str, source: Store, on_bytes: OnBytes) -> int:
        """See `Store`; a temporary name is used because not every file system writes whole files or none."""
        name = blob_name(digest)
        temporary = f"{name.rpartition('/')[0]}/{PARTIAL}{digest}"
        self._make_parent(name)
        hasher, num_moved = hashlib.sha256(), 0
        with source.open_blob(digest, 0) as stream, self._system.open(self._path(temporary), "wb") as file:
            for chunk in chunks(stream):
                file.write(chunk)
                hasher.update(chunk)
                num_moved += len(chunk)
                on_bytes(len(chunk))
        arrived = self._digest(temporary) if self._read_back else hasher.hexdigest()
        if not hasher.hexdigest() == arrived == digest:
            self._system.rm_file(self._path(temporary))
            raise DigestMismatchError(f"blob {digest}: what came from {source.place} has another digest")
        self._system.mv(self._path(temporary), self._path(name))
        return num_moved

    def writing(self) -> AbstractContextManager[None]:
        """See `Store`."""
        return nullcontext()

    def holding(self, generations: Iterable[int]) -> AbstractContextManager[None]:  # noqa: ARG002 - nobody collects here
        """See `Store`."""
        return nullcontext()

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _make_parent(self, name: str) -> None:
        self._system.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)

    def _digest(self, name: str) -> str:
        hasher = hashlib.sha256()
        with self._system.open(self._path(name), "rb") as file:
            for chunk in chunks(cast("BinaryIO", file)):
                hasher.update(chunk)
        return hasher.hexdigest()
