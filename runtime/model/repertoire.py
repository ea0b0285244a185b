"""The repertoire on disk: immutable blobs and manifests, and a HEAD that is replaced atomically.

It knows nothing of what the tensors mean beyond names, shapes and digests, and caches nothing but blob headers.
Read first: a writer writes blobs, then the manifest, then HEAD; a crash anywhere before the last rename leaves the
previous generation current. A reader that must keep a generation while others are collected (`runtime.model.collect`)
holds it with `hold_generation`; nothing else needs a lock. `docs/FORMAT.md` is the normative text.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from runtime.errors import (
    BlobMissingError,
    BlobTruncatedError,
    DigestMismatchError,
    GenerationMismatchError,
    InvalidInputError,
    NonFiniteError,
    NotARepertoireError,
)
from runtime.kernels.inspection import Inspected, Inspector
from runtime.model.durable import OnStep, no_step, write_durably
from runtime.model.expert import Expert, UnitForm, check_header
from runtime.model.layout import (
    HEAD,
    blob_name,
    head_bytes,
    manifest_name,
    manifest_numbers,
    parse_head,
    signature_name,
    tombstone_name,
)
from runtime.model.lease import shared_lease
from runtime.model.manifest import BaseRef, ExpertSet, Manifest, Unit, parse_manifest
from runtime.model.side_by_side import Allocate, bring_absent, fresh_memory, read_header, read_side_by_side
from runtime.model.signature import Signer, TrustPolicy
from runtime.model.small_blob import small_tensors


class Repertoire:
    """A folder of generations.

    Args:
        root: the folder; it may be empty or absent until the first `publish`.
        trust: whose signatures count, checked whenever a manifest is read; None reads no signatures.
        on_step: called with a name before every step of `publish` that changes the disk; lets tests die there.

    Safe to share between threads; writers of several processes exclude one another with a lock file.
    """

    def __init__(self, root: Path, *, trust: TrustPolicy | None = None, on_step: OnStep = no_step) -> None:
        self.root = root
        self._root_name = str(root)
        self.trust = trust
        self._on_step = on_step
        self._checked_headers: set[str] = set()
        self._lock = threading.Lock()

    # ---- reading

    def head(self) -> int | None:
        """Return the number of the current generation, or None where nothing was ever published.

        Raises:
            ManifestError: HEAD does not hold a number.
        """
        path = self.root / HEAD
        try:
            return parse_head(path.read_bytes(), source=str(path))
        except FileNotFoundError:
            return None

    def generations(self) -> tuple[int, ...]:
        """Return the numbers of all published generations that are still here, ascending."""
        head = self.head() or 0
        return tuple(number for number in manifest_numbers(self.root) if number <= head)

    def manifest(self, generation: int | None = None) -> Manifest:
        """Read a generation's manifest; the current one by default.

        Raises:
            NotARepertoireError: nothing was published here, or not this generation.
            UnknownSchemaError, ManifestError: see `parse_manifest`.
            SignatureError: `trust` refuses it.
        """
        number = self._number(generation)
        path = self.manifest_path(number)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise self._not_here(number) from error
        if self.trust is not None:
            self.trust.check(data, self.signature(number), source=path.name)
        return parse_manifest(data, source=path.name, generation=number)

    def signature(self, generation: int) -> bytes | None:
        """Return the signature file of a generation as it is; None where there is none."""
        try:
            return (self.root / signature_name(generation)).read_bytes()
        except FileNotFoundError:
            return None

    @contextmanager
    def hold_generation(self, generation: int | None = None) -> Iterator[int]:
        """Hold a generation, the current one by default: while the block runs, no collector removes any of it.

        Costs one open file; works in any number of threads and processes, and without the right to write.

        Yields:
            its number.

        Raises:
            NotARepertoireError: nothing was published here, or this generation was collected.
        """
        while True:
            number = self._number(generation)
            with shared_lease(self.manifest_path(number)) as here:
                if here:
                    yield number
                    return
            # Between the two reads the current generation can become an old one and be collected.
            if generation is not None or self.head() == number:
                raise self._not_here(number)

    def read_unit(
        self,
        entry: ExpertSet,
        unit: Unit,
        base: BaseRef,
        *,
        data: Inspected | None = None,
        form: UnitForm | None = None,
    ) -> Expert:
        """Read, check and parse one expert: one contiguous read of `unit.bytes` bytes.

        The blob's header is checked on its first use, the unit's SHA-256 and its numbers on every read.

        Args:
            entry: its set.
            unit: which of it.
            base: what its shapes must fit.
            data: its bytes, where `read_units` has read them with others; the expert takes them over.
            form: of this unit, where the caller keeps it for the next time.

        Raises:
            BlobMissingError, BlobTruncatedError, DigestMismatchError, TensorMismatchError, NonFiniteError.
        """
        if data is None:
            (data,) = self.read_units(entry, [unit], base)
        if data.sha256 != unit.sha256:
            raise DigestMismatchError(f"blob {entry.digest}: layer {unit.layer} does not have the digest {unit.sha256}")
        if not data.finite:
            raise NonFiniteError(f"expert set {entry.digest}: layer {unit.layer} holds NaN or infinity")
        return (form or UnitForm(unit, entry, base)).expert(data.data)

    def read_units(
        self,
        entry: ExpertSet,
        units: Sequence[Unit],
        base: BaseRef,
        *,
        allocate: Allocate = fresh_memory,
        inspector: Inspector | None = None,
    ) -> list[Inspected]:
        """Read the bytes of units of one set, those that lie side by side in one go; each has memory of its own.

        They are looked at, and `read_unit` judges what was found.

        Args:
            entry: the set.
            units: which of it.
            base: what their shapes must fit.
            allocate: where the bytes go.
            inspector: looks at them.

        Raises:
            BlobMissingError, BlobTruncatedError, TensorMismatchError: as `read_unit`, which checks the rest.
        """
        try:
            descriptor = self._open_blob(entry.digest)
        except FileNotFoundError as error:
            raise BlobMissingError(f"blob {entry.digest} of task {entry.task} is not on disk") from error
        try:
            size = os.fstat(descriptor).st_size
            if size != entry.bytes:
                raise BlobTruncatedError(f"blob {entry.digest}: {size} bytes on disk, the manifest says {entry.bytes}")
            bring_absent(descriptor, entry, units)
            self._check_header_once(descriptor, entry, base)
            return read_side_by_side(descriptor, entry, units, allocate, inspector or Inspector())
        finally:
            os.close(descriptor)

    def read_tensors(self, digest: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """Read a small blob whole: exactly the float32 tensors named in `shapes`.

        Raises:
            BlobMissingError, DigestMismatchError, TensorMismatchError, NonFiniteError.
        """
        try:
            descriptor = self._open_blob(digest)
        except FileNotFoundError as error:
            raise BlobMissingError(f"blob {digest} is not on disk") from error
        try:
            data = bytearray(os.fstat(descriptor).st_size)
            os.preadv(descriptor, [data], 0)
        finally:
            os.close(descriptor)
        if hashlib.sha256(data).hexdigest() != digest:
            raise DigestMismatchError(f"blob {digest}: {len(data)} bytes on disk have another digest")
        return small_tensors(data, shapes, digest=digest)

    # ---- writing

    def publish(
        self, manifest: Manifest, blobs: Mapping[str, bytes], *, expected: int | None, signer: Signer | None = None
    ) -> None:
        """Make `manifest` the current generation.

        Blobs that are on disk already are not written again. On return everything is durable (fsync).

        Args:
            manifest: the new generation; its number must be `expected` + 1 (1 for the first), its parent `expected`.
            blobs: digest -> bytes of what may be missing on disk.
            expected: the generation that the caller read before; None for the first.
            signer: signs the manifest before it becomes current.

        Raises:
            GenerationMismatchError: HEAD is not `expected` (compare and swap).
            BlobMissingError: the manifest names a blob that is neither on disk nor in `blobs`.
            OSError: the disk is full, or refuses; the previous generation is still current.
        """
        number = manifest.generation
        with self.writer_lock():
            current = self.head()
            if (current, manifest.parent, number) != (expected, expected, (expected or 0) + 1):
                raise GenerationMismatchError(
                    f"generation {number} was made on {manifest.parent}, current is {current}"
                )
            for digest in sorted(manifest.blob_digests()):
                path = self.blob_path(digest)
                if digest in blobs:
                    if hashlib.sha256(blobs[digest]).hexdigest() != digest:
                        raise DigestMismatchError(f"blob {digest}: the bytes to publish have another digest")
                    if not path.exists():
                        self._write(path, blobs[digest], "blob")
                elif not path.exists():
                    raise BlobMissingError(f"blob {digest} is neither on disk nor published with the manifest")
            # A publish of this number that was killed may have left a signature over another manifest.
            (self.root / signature_name(number)).unlink(missing_ok=True)
            data = manifest.to_json()
            self._write(self.manifest_path(number), data, "manifest")
            if signer is not None:
                self._write(self.root / signature_name(number), signer.sign(data), "signature")
            self._write(self.root / HEAD, head_bytes(number), "head")

    def rollback(self, *, expected: int, to: int, signer: Signer | None = None) -> Manifest:
        """Publish a new generation whose content is that of an older one; numbers only grow.

        Args:
            expected: the generation that the caller read before.
            to: the older generation.
            signer: signs the new manifest before it becomes current.

        Returns:
            the manifest of the new generation.

        Raises:
            InvalidInputError: `to` is not older than `expected`.
            NotARepertoireError: generation `to` is not here, or was collected.
            GenerationMismatchError: HEAD is not `expected`.
        """
        if to >= expected:
            raise InvalidInputError("to", to, f"must be older than the current generation, {expected}")
        with self.hold_generation(to):
            manifest = self.manifest(to).model_copy(update={"generation": expected + 1, "parent": expected})
            self.publish(manifest, {}, expected=expected, signer=signer)
        return manifest

    def sign(self, generation: int, signer: Signer) -> None:
        """Sign the manifest of a published generation; a signature that it had is replaced.

        Raises:
            NotARepertoireError: this generation is not here.
            UnknownSchemaError, ManifestError: it is not one that this code reads.
        """
        with self.hold_generation(generation), self.writer_lock():
            data = self.manifest_path(generation).read_bytes()
            parse_manifest(data, source=manifest_name(generation), generation=generation)
            self._write(self.root / signature_name(generation), signer.sign(data), "signature")

    def _write(self, path: Path, data: bytes, kind: str) -> None:
        write_durably(path, data, kind=kind, on_step=self._on_step)

    @contextmanager
    def writer_lock(self) -> Iterator[None]:
        """Exclude every other writer, in this process and in others; makes the root folder where it is not there."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".writer-lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # ---- places

    def manifest_path(self, generation: int) -> Path:
        """Return the place of a generation's manifest; it need not exist."""
        return self.root / manifest_name(generation)

    def blob_path(self, digest: str) -> Path:
        """Return the place of a blob; it need not exist.

        Raises:
            PathEscapeError: `digest` is not 64 hexadecimal digits.
        """
        return self.root / blob_name(digest)

    def export_folder(self, generation: int, target: str) -> Path:
        """Return the folder of one export target; it need not exist."""
        return self.root / "exports" / f"{generation:06d}" / target

    def _number(self, generation: int | None) -> int:
        number = self.head() if generation is None else generation
        if number is None:
            raise NotARepertoireError(f"{self.root}: no HEAD; `greenroom train` makes a repertoire")
        return number

    def _not_here(self, generation: int) -> NotARepertoireError:
        collected = (self.root / tombstone_name(generation)).exists()
        return NotARepertoireError(
            f"{self.root}: generation {generation} {'was collected' if collected else 'is not here'}"
        )

    def _open_blob(self, digest: str) -> int:
        """A descriptor; without `pathlib`, which would be a good part of the time of a load."""
        return os.open(os.path.join(self._root_name, blob_name(digest)), os.O_RDONLY)  # noqa: PTH118

    def _check_header_once(self, descriptor: int, entry: ExpertSet, base: BaseRef) -> None:
        with self._lock:  # whoever comes second waits, and saves the work
            if entry.digest not in self._checked_headers:
                check_header(read_header(descriptor, entry), entry, base)
                self._checked_headers.add(entry.digest)
