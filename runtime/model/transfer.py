"""Push and pull: bring a repertoire's newer generations from one store to another.

It knows nothing of how stores keep their files.
Read first: only what is missing moves, blobs first, then manifests, then HEAD, so that the target is readable at any
moment and an interrupted transfer goes on where it stopped. The target's history must be the beginning of the source's;
nothing is ever deleted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from runtime.errors import (
    BlobMissingError,
    GenerationMismatchError,
    ManifestError,
    NotARepertoireError,
)
from runtime.model.layout import (
    HEAD,
    head_bytes,
    is_digest,
    manifest_name,
    parse_head,
    signature_name,
    tombstone_name,
)
from runtime.model.manifest import Manifest, parse_manifest
from runtime.model.repertoire import Repertoire
from runtime.model.signature import TrustPolicy
from runtime.model.store import LocalStore, Store

OnProgress = Callable[[int, int], None]
"""Called with bytes that have arrived, and bytes that are to arrive in all."""


@dataclass(frozen=True, kw_only=True)
class Transferred:
    """What a transfer did.

    Args:
        head: the target's current generation now.
        generations: those whose manifests moved, ascending.
        num_blobs: blobs that moved.
        num_bytes: of blobs, as read from the source; what an earlier attempt had brought is not in it.
    """

    head: int
    generations: tuple[int, ...]
    num_blobs: int
    num_bytes: int


def push(repertoire: Repertoire, target: Store, *, on_progress: OnProgress = lambda _done, _total: None) -> Transferred:
    """Bring everything that is newer than the target's current generation there; see `transfer`."""
    return transfer(LocalStore(repertoire), target, trust=repertoire.trust, on_progress=on_progress)


def pull(repertoire: Repertoire, source: Store, *, on_progress: OnProgress = lambda _done, _total: None) -> Transferred:
    """Bring everything that is newer than the repertoire's current generation here; see `transfer`.

    With `repertoire.trust`, manifests that it refuses are not taken.
    """
    return transfer(source, LocalStore(repertoire), trust=repertoire.trust, on_progress=on_progress)


def transfer(source: Store, target: Store, *, trust: TrustPolicy | None, on_progress: OnProgress) -> Transferred:
    """Make the source's current generation the target's.

    Args:
        source: is only read.
        target: may be empty.
        trust: whose signatures count, checked before anything moves; None checks none.
        on_progress: called with bytes that have arrived, and bytes that are to arrive in all.

    Raises:
        NotARepertoireError: nothing was published at the source.
        GenerationMismatchError: the target's current generation is not one that the source's was made on, or changed
            meanwhile.
        SignatureError: `trust` refuses a manifest.
        BlobMissingError, DigestMismatchError: the source is damaged; the target's current generation is what it was.
    """
    newest = _head(source)
    if newest is None:
        raise NotARepertoireError(f"{source.place}: no HEAD; there is nothing to bring")
    with target.writing():
        current = _head(target)
        if current is not None:
            _check_history(source, target, current, newest)
        numbers = range((current or 0) + 1, newest + 1)
        with source.holding((*numbers, newest)):
            plan = _Plan.make(source, numbers, trust)
            # Blobs that were lost from what the target has already come again.
            manifests = plan.manifests or _Plan.make(source, range(newest, newest + 1), trust).manifests
            num_blobs, num_bytes = _bring_blobs(source, target, manifests, on_progress)
            for name, data in plan.files:
                target.write(name, data)
        if _head(target) != current:
            raise GenerationMismatchError(f"{target.place}: somebody else published meanwhile; HEAD is left as it is")
        if current == newest:
            _bring_signature(source, target, newest, trust)
        else:
            target.write(HEAD, head_bytes(newest))
    return Transferred(
        head=newest,
        generations=tuple(manifest.generation for manifest in plan.manifests),
        num_blobs=num_blobs,
        num_bytes=num_bytes,
    )


@dataclass(frozen=True)
class _Plan:
    """What is to move: manifests as they are understood, and the small files in the order of writing."""

    manifests: tuple[Manifest, ...]
    files: tuple[tuple[str, bytes], ...]

    @classmethod
    def make(cls, source: Store, numbers: range, trust: TrustPolicy | None) -> _Plan:
        manifests, files = [], []
        for number in numbers:
            name = manifest_name(number)
            data = source.read(name)
            if data is not None:
                signature = source.read(signature_name(number))
                if trust is not None:
                    trust.check(data, signature, source=name)
                manifests.append(parse_manifest(data, source=name, generation=number))
                files.append((name, data))
                if signature is not None:
                    files.append((signature_name(number), signature))
            elif number == numbers[-1]:
                raise NotARepertoireError(f"{source.place}: generation {number} is not there")
            elif (digest := _manifest_digest(source, number)) is not None:
                files.append((tombstone_name(number), f"{digest}\n".encode()))
        return cls(tuple(manifests), tuple(files))


def _bring_blobs(
    source: Store, target: Store, manifests: Iterable[Manifest], on_progress: OnProgress
) -> tuple[int, int]:
    """Bring the blobs that the target lacks; returns how many, and bytes read from the source."""
    needed = sorted({digest for manifest in manifests for digest in manifest.blob_digests()})
    there, here = source.blob_sizes(), target.blob_sizes()
    for digest in needed:
        if digest not in there:
            raise BlobMissingError(f"blob {digest} is not in {source.place}")
    # A blob of another length is no blob of that name: it comes again.
    missing = [digest for digest in needed if here.get(digest) != there[digest]]
    total = sum(there[digest] for digest in missing)
    num_arrived = 0

    def on_bytes(count: int) -> None:
        nonlocal num_arrived
        num_arrived += count
        on_progress(num_arrived, total)

    on_progress(0, total)
    return len(missing), sum(target.receive_blob(digest, source, on_bytes) for digest in missing)


def _bring_signature(source: Store, target: Store, number: int, trust: TrustPolicy | None) -> None:
    """Both have this generation; a signature that the source got later is brought after it."""
    signature = source.read(signature_name(number))
    if signature is None or signature == target.read(signature_name(number)):
        return
    if trust is not None:
        trust.check(source.read(manifest_name(number)) or b"", signature, source=signature_name(number))
    target.write(signature_name(number), signature)


def _check_history(source: Store, target: Store, current: int, newest: int) -> None:
    """Check that the target's current generation is the source's, or one that it was made on.

    Generations are made one on the other, so two histories with an equal generation are equal up to it.
    """
    common = min(current, newest)
    ours, theirs = _manifest_digest(source, common), _manifest_digest(target, common)
    if ours is None or theirs is None:
        place = source.place if ours is None else target.place
        raise GenerationMismatchError(f"{place}: generation {common} is not there, so histories cannot be compared")
    if ours != theirs:
        raise GenerationMismatchError(
            f"{target.place} has another history: its generation {common} is not that of {source.place}"
        )
    if current > newest:
        raise GenerationMismatchError(
            f"{target.place} is at generation {current}, {source.place} only at {newest}: nothing newer to bring"
        )


def _manifest_digest(store: Store, number: int) -> str | None:
    """SHA-256 of a manifest, also of one that was collected; None where nothing is known of it."""
    data = store.read(manifest_name(number))
    if data is not None:
        return hashlib.sha256(data).hexdigest()
    tombstone = store.read(tombstone_name(number))
    if tombstone is None:
        return None
    text = tombstone.decode("ascii", errors="replace").strip()
    if not is_digest(text):
        raise ManifestError(f"{store.place}: {tombstone_name(number)} does not hold a SHA-256")
    return text


def _head(store: Store) -> int | None:
    data = store.read(HEAD)
    return None if data is None else parse_head(data, source=f"{store.place}/{HEAD}")
