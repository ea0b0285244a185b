"""The repertoire on disk: immutable blobs and manifests, and a HEAD that is replaced atomically.

It knows nothing of what the tensors mean beyond names, shapes and digests, and caches nothing but blob headers.
Read first: readers never lock. A writer writes blobs, then the manifest, then HEAD; a crash anywhere before the last
rename leaves the previous generation current. `docs/FORMAT.md` is the normative text.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from runtime.errors import (
    BlobMissingError,
    BlobTruncatedError,
    DigestMismatchError,
    GenerationMismatchError,
    ManifestError,
    NonFiniteError,
    NotARepertoireError,
    PathEscapeError,
    TensorMismatchError,
)
from runtime.model.expert import Expert, blob_header, check_header, parse_unit
from runtime.model.manifest import BaseRef, ExpertSet, Manifest, Unit, parse_manifest

_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_HEADER_BYTES = 16 << 20


class Repertoire:
    """A folder of generations.

    Args:
        root: the folder; it may be empty or absent until the first `publish`.
        on_step: called with a name before every step of `publish` that changes the disk; lets tests die there.

    Safe to share between threads; writers of several processes exclude one another with a lock file.
    """

    def __init__(self, root: Path, *, on_step: Callable[[str], None] = lambda _step: None) -> None:
        self.root = root
        self._on_step = on_step
        self._checked_headers: set[str] = set()
        self._lock = threading.Lock()

    # ---- reading

    def head(self) -> int | None:
        """Return the number of the current generation, or None where nothing was ever published.

        Raises:
            ManifestError: HEAD does not hold a number.
        """
        try:
            text = (self.root / "HEAD").read_text()
        except FileNotFoundError:
            return None
        if not re.fullmatch(r"[1-9][0-9]{0,5}\n", text):
            raise ManifestError(f"{self.root / 'HEAD'}: expected a generation number, found {text[:40]!r}")
        return int(text)

    def manifest(self, generation: int | None = None) -> Manifest:
        """Read a generation's manifest; the current one by default.

        Raises:
            NotARepertoireError: nothing was published here, or not this generation.
            UnknownSchemaError, ManifestError: see `parse_manifest`.
        """
        number = self.head() if generation is None else generation
        if number is None:
            raise NotARepertoireError(f"{self.root}: no HEAD; `greenroom train` makes a repertoire")
        path = self._manifest_path(number)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise NotARepertoireError(f"{self.root}: generation {number} is not here") from error
        manifest = parse_manifest(data, source=path.name)
        if manifest.generation != number:
            raise ManifestError(f"{path.name}: generation={manifest.generation}, the file name says {number}")
        return manifest

    def read_unit(self, entry: ExpertSet, unit: Unit, base: BaseRef) -> Expert:
        """Read, check and parse one expert: one contiguous read of `unit.bytes` bytes.

        The blob's header is checked on its first use; the unit's SHA-256 and finiteness on every read.

        Raises:
            BlobMissingError, BlobTruncatedError, DigestMismatchError, TensorMismatchError, NonFiniteError.
        """
        path = self._blob_path(entry.digest)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise BlobMissingError(f"blob {entry.digest} of task {entry.task} is not on disk") from error
        try:
            size = os.fstat(descriptor).st_size
            if size != entry.bytes:
                raise BlobTruncatedError(f"blob {entry.digest}: {size} bytes on disk, the manifest says {entry.bytes}")
            self._check_header_once(descriptor, entry, base)
            data = bytearray(unit.bytes)
            if os.preadv(descriptor, [data], unit.offset) != unit.bytes:
                raise BlobTruncatedError(f"blob {entry.digest}: layer {unit.layer} ends early")
        finally:
            os.close(descriptor)
        if hashlib.sha256(data).hexdigest() != unit.sha256:
            raise DigestMismatchError(f"blob {entry.digest}: layer {unit.layer} does not have the digest {unit.sha256}")
        return parse_unit(data, unit, entry, base)

    def read_tensors(self, digest: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """Read a small blob whole: exactly the float32 tensors named in `shapes`.

        Raises:
            BlobMissingError, DigestMismatchError, TensorMismatchError, NonFiniteError.
        """
        try:
            data = self._blob_path(digest).read_bytes()
        except FileNotFoundError as error:
            raise BlobMissingError(f"blob {digest} is not on disk") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise DigestMismatchError(f"blob {digest}: {len(data)} bytes on disk have another digest")
        try:
            tensors: dict[str, torch.Tensor] = load(data)
        except SafetensorError as error:
            raise TensorMismatchError(f"blob {digest}: not a safetensors file: {error}") from error
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        wanted = {name: (torch.float32, shape) for name, shape in shapes.items()}
        if found != wanted:
            names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
            first = names[0]
            raise TensorMismatchError(f"blob {digest}: {first} is {found.get(first)}, needed is {wanted.get(first)}")
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(f"blob {digest}: {name} holds NaN or infinity")
        return tensors

    # ---- writing

    def publish(self, manifest: Manifest, blobs: Mapping[str, bytes], *, expected: int | None) -> None:
        """Make `manifest` the current generation.

        Blobs that are on disk already are not written again. On return everything is durable (fsync).

        Args:
            manifest: the new generation; its number must be `expected` + 1 (1 for the first).
            blobs: digest -> bytes of what may be missing on disk.
            expected: the generation that the caller read before; None for the first.

        Raises:
            GenerationMismatchError: HEAD is not `expected` (compare and swap).
            BlobMissingError: the manifest names a blob that is neither on disk nor in `blobs`.
        """
        (self.root / "generations").mkdir(parents=True, exist_ok=True)
        with self._writer_lock():
            current = self.head()
            if current != expected or manifest.generation != (expected or 0) + 1:
                raise GenerationMismatchError(
                    f"generation {manifest.generation} was made on {expected}, current is {current}"
                )
            for digest in sorted(manifest.blob_digests()):
                path = self._blob_path(digest)
                if digest in blobs:
                    if hashlib.sha256(blobs[digest]).hexdigest() != digest:
                        raise DigestMismatchError(f"blob {digest}: the bytes to publish have another digest")
                    if not path.exists():
                        self._write(path, blobs[digest], "blob")
                elif not path.exists():
                    raise BlobMissingError(f"blob {digest} is neither on disk nor published with the manifest")
            self._write(self._manifest_path(manifest.generation), manifest.to_json(), "manifest")
            self._write(self.root / "HEAD", f"{manifest.generation}\n".encode(), "head")

    def _write(self, path: Path, data: bytes, kind: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                self._on_step(f"write {kind}")
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self._on_step(f"rename {kind}")
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._on_step(f"done {kind}")

    @contextmanager
    def _writer_lock(self) -> Iterator[None]:
        with (self.root / ".writer-lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # ---- places

    def _manifest_path(self, generation: int) -> Path:
        return self.root / "generations" / f"{generation:06d}.json"

    def _blob_path(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise PathEscapeError(f"blob {digest[:80]!r}: a digest is 64 hexadecimal digits")
        return self.root / "blobs" / "sha256" / digest[:2] / digest

    def export_folder(self, generation: int, target: str) -> Path:
        """Return the folder of one export target; it need not exist."""
        return self.root / "exports" / f"{generation:06d}" / target

    def _check_header_once(self, descriptor: int, entry: ExpertSet, base: BaseRef) -> None:
        with self._lock:
            if entry.digest in self._checked_headers:
                return
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if not 0 < length <= min(_MAX_HEADER_BYTES, entry.bytes - 8):
            raise TensorMismatchError(f"blob {entry.digest}: a header of {length} bytes cannot be right")
        header, data_start = _parse_header(os.pread(descriptor, 8 + length, 0), entry.digest)
        check_header(header, data_start, entry, base)
        with self._lock:
            self._checked_headers.add(entry.digest)


def _parse_header(data: bytes, digest: str) -> tuple[dict[str, dict[str, list[int]]], int]:
    try:
        return blob_header(data)
    except ValueError as error:
        raise TensorMismatchError(f"blob {digest}: the header is not JSON") from error
