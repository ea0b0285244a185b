"""Collection: removes generations that nobody needs any more, and what only they needed.

It knows nothing of tensors, and nothing of exports, which stay where they are.
Read first: manifests go first and blobs last, under the writer lock and never while a reader holds the generation
(`Repertoire.hold_generation`); killed anywhere, it leaves at most files that the next run removes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import InvalidInputError, NotARepertoireError
from runtime.model.digest import sha256_of_file
from runtime.model.durable import OnStep, no_step, sync_folder, write_durably
from runtime.model.layout import BLOBS, GENERATIONS, PARTIAL, is_digest, manifest_numbers, tombstone_name
from runtime.model.lease import sole_lease
from runtime.model.repertoire import Repertoire

DEFAULT_KEEP = 3
DEFAULT_GRACE_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What `collect` did, or would do.

    Args:
        kept: generations that stay because they are among the newest.
        held: older generations that stay because a reader holds them.
        removed: generations that went.
        num_blobs: blobs that went.
        num_leftovers: files of crashed writers that went.
        freed_bytes: of blobs and leftovers.
    """

    kept: tuple[int, ...]
    held: tuple[int, ...]
    removed: tuple[int, ...]
    num_blobs: int
    num_leftovers: int
    freed_bytes: int


def collect(
    repertoire: Repertoire,
    *,
    keep: int = DEFAULT_KEEP,
    grace_s: float = DEFAULT_GRACE_S,
    dry_run: bool = False,
    on_step: OnStep = no_step,
) -> Collected:
    """Remove all but the newest `keep` generations, blobs that no remaining one names, and crash leftovers.

    Of a removed generation the SHA-256 of its manifest stays, so that histories can still be compared.

    Args:
        repertoire: what to collect.
        keep: newest generations that stay, the current one among them.
        grace_s: seconds for which a temporary file is left alone.
        dry_run: change nothing.
        on_step: told before every step that changes the disk; lets tests die there.

    Raises:
        InvalidInputError: `keep` or `grace_s` is too small.
        NotARepertoireError: nothing was published here.
        RepertoireError: a manifest that stays cannot be read, so nobody knows what it needs; nothing was removed.
    """
    if keep < 1:
        raise InvalidInputError("keep", keep, "the current generation always stays; at least 1")
    if grace_s < 0:
        raise InvalidInputError("grace_s", grace_s, "must not be negative")
    if repertoire.head() is None:
        raise NotARepertoireError(f"{repertoire.root}: no HEAD; nothing is known to be unneeded")
    with repertoire.writer_lock(), ExitStack() as leases:
        current = repertoire.manifest()
        kept = repertoire.generations()[-keep:]
        held: list[int] = []
        removed: list[int] = []
        for number in manifest_numbers(repertoire.root):
            if number not in kept:
                alone = leases.enter_context(sole_lease(repertoire.manifest_path(number)))
                (removed if alone else held).append(number)
        staying = [current, *(repertoire.manifest(number) for number in (*kept[:-1], *held))]
        needed = {digest for manifest in staying for digest in manifest.blob_digests()}
        blobs = [path for path in _blobs(repertoire.root) if path.name not in needed]
        leftovers = list(_partials(repertoire.root, older_than=time.time() - grace_s))
        freed_bytes = sum(path.stat().st_size for path in (*blobs, *leftovers))
        if not dry_run:
            _remove_generations(repertoire, removed, on_step)
            for path in (*blobs, *leftovers):
                on_step("remove file")
                path.unlink()
    return Collected(
        kept=kept,
        held=tuple(held),
        removed=tuple(removed),
        num_blobs=len(blobs),
        num_leftovers=len(leftovers),
        freed_bytes=freed_bytes,
    )


def _remove_generations(repertoire: Repertoire, numbers: list[int], on_step: OnStep) -> None:
    """Remove manifests, leaving the digest of those that were published, and signatures without a manifest."""
    folder = repertoire.root / GENERATIONS
    published = repertoire.generations()
    for number in numbers:
        path = repertoire.manifest_path(number)
        if number in published:
            digest = sha256_of_file(path)
            write_durably(
                repertoire.root / tombstone_name(number), f"{digest}\n".encode(), kind="tombstone", on_step=on_step
            )
        on_step("remove manifest")
        path.unlink()
    for signature in folder.glob("*.sig"):
        if not signature.with_suffix(".json").exists():
            on_step("remove signature")
            signature.unlink()
    # A manifest must not come back after a power cut when its blobs are gone.
    sync_folder(folder)


def _blobs(root: Path) -> Iterator[Path]:
    return (path for path in (root / BLOBS).glob("??/*") if is_digest(path.name))


def _partials(root: Path, *, older_than: float) -> Iterator[Path]:
    for pattern in ("*", f"{GENERATIONS}/*", f"{BLOBS}/??/*"):
        for path in root.glob(pattern):
            if path.name.startswith(PARTIAL) and path.is_file() and path.stat().st_mtime < older_than:
                yield path
