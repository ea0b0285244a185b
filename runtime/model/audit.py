"""Audit: reads everything of a generation and reports every fault, not only the first.

It repairs nothing.
Read first: what generations share is read once; a fault says in which generations it lies.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from safetensors import SafetensorError, safe_open

from runtime.errors import (
    BlobMissingError,
    BlobTruncatedError,
    DigestMismatchError,
    RepertoireError,
    TensorMismatchError,
)
from runtime.model.density import background_shapes, density_shapes, prototype_shapes
from runtime.model.digest import sha256_of_file
from runtime.model.hyper_sets import stored_shapes
from runtime.model.locator import frame_shapes, projected_width
from runtime.model.manifest import ExpertSet, Manifest
from runtime.model.repertoire import Repertoire
from runtime.model.routers import hyper_sizes, router_shapes

OnBytes = Callable[[int, int], None]
"""Called with bytes read so far, and bytes to read in all."""

_Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong.

    Args:
        generations: where it was found, ascending.
        where: manifest, locator frame, or the task's expert set, router or density.
        error: what a reader would raise.
    """

    generations: tuple[int, ...]
    where: str
    error: RepertoireError


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What was read and what was found.

    Args:
        generations: those that were asked for.
        num_blobs: different blobs that their readable manifests name.
        num_bytes: of those that are there.
        faults: everything that is wrong, by generation.
    """

    generations: tuple[int, ...]
    num_blobs: int
    num_bytes: int
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class _Check:
    """One blob and what it must hold: the experts of an entry, exactly these tensors, or just what has its digest."""

    where: str
    digest: str
    holds: ExpertSet | _Shapes | None


def audit(
    repertoire: Repertoire, generations: Iterable[int], *, on_progress: OnBytes = lambda _done, _total: None
) -> Audit:
    """Check manifests (and signatures, if `repertoire.trust` is set), digests, headers, tensors and their values.

    Args:
        repertoire: what to read; never changed.
        generations: numbers.
        on_progress: called with bytes read so far, and bytes to read in all.
    """
    numbers = tuple(dict.fromkeys(generations))
    found: dict[tuple[str, str], tuple[RepertoireError, list[int]]] = {}

    def note(number: int, where: str, error: RepertoireError) -> None:
        found.setdefault((where, str(error)), (error, []))[1].append(number)

    manifests: list[Manifest] = []
    for number in numbers:
        try:
            manifests.append(repertoire.manifest(number))
        except RepertoireError as error:
            note(number, "manifest", error)
    digests = {digest for manifest in manifests for digest in manifest.blob_digests()}
    total = sum(_size(repertoire, digest) for digest in digests)
    done: dict[str, list[RepertoireError]] = {}
    seen: set[str] = set()
    num_read = 0
    # Header checks are remembered by a repertoire; an audit begins with none.
    fresh = Repertoire(repertoire.root)
    for manifest in manifests:
        for check in _all_checks(manifest):
            key = repr((check.digest, check.holds, manifest.base))
            if key not in done:
                done[key] = list(_run(fresh, manifest, check))
            if check.digest not in seen:
                seen.add(check.digest)
                num_read += _size(repertoire, check.digest)
                on_progress(num_read, total)
            for fault in done[key]:
                note(manifest.generation, check.where, fault)
    faults = [Fault(generations=tuple(in_), where=where, error=error) for (where, _), (error, in_) in found.items()]
    return Audit(
        generations=numbers,
        num_blobs=len(digests),
        num_bytes=total,
        faults=tuple(sorted(faults, key=lambda fault: fault.generations)),
    )


def _checks(manifest: Manifest) -> Iterator[_Check]:
    width = manifest.base.width
    for name, shared in (("locator", manifest.locator), ("arrival", manifest.arrival)):
        yield _Check(f"{name} frame", shared.frame, frame_shapes(width, shared.feature))
        if shared.background is not None:
            yield _Check(f"{name} background", shared.background, background_shapes(projected_width(shared.feature)))
    for entry in manifest.experts:
        yield _Check(f"{entry.task}: experts", entry.digest, entry)
    for task in manifest.tasks:
        yield _Check(f"{task.name}: router", task.router.digest, router_shapes(manifest, task))
        for name, ref, density in (
            ("density", manifest.locator, task.locator),
            ("density on arrival", manifest.arrival, task.arrival),
        ):
            yield _Check(
                f"{task.name}: {name}", density.digest, density_shapes(ref.density, projected_width(ref.feature))
            )
            if density.prototype is not None:
                yield _Check(f"{task.name}: prototype of {name}", density.prototype, prototype_shapes())
        if task.hyper:
            sizes = hyper_sizes(manifest, task, task.hyper)
            yield _Check(f"{task.name}: hyper-adapters", task.hyper.digest, stored_shapes(task.hyper.kind, sizes))


def _all_checks(manifest: Manifest) -> Iterator[_Check]:
    """Those of `_checks`; and whatever else a manifest may name must at least have its digest."""
    known = set()
    for check in _checks(manifest):
        known.add(check.digest)
        yield check
    for digest in sorted(manifest.blob_digests() - known):
        yield _Check("blob", digest, None)


def _run(repertoire: Repertoire, manifest: Manifest, check: _Check) -> Iterator[RepertoireError]:
    """Yield what is wrong with one blob; the same words only once."""
    if isinstance(check.holds, ExpertSet):
        texts = set()
        for error in _expert_set_faults(repertoire, manifest, check.holds):
            if str(error) not in texts:
                texts.add(str(error))
                yield error
        return
    try:
        if check.holds is None:
            _check_digest(repertoire, check.digest)
        else:
            repertoire.read_tensors(check.digest, check.holds)
    except RepertoireError as error:
        yield error


def _check_digest(repertoire: Repertoire, digest: str) -> None:
    try:
        found = sha256_of_file(repertoire.blob_path(digest))
    except FileNotFoundError as error:
        raise BlobMissingError(f"blob {digest} is not on disk") from error
    if found != digest:
        raise DigestMismatchError(f"blob {digest}: the bytes on disk have the digest {found}")


def _expert_set_faults(repertoire: Repertoire, manifest: Manifest, entry: ExpertSet) -> Iterator[RepertoireError]:
    try:
        _check_digest(repertoire, entry.digest)
    except BlobMissingError as error:
        yield error
        return
    except DigestMismatchError as error:
        yield error
    path = repertoire.blob_path(entry.digest)
    size = path.stat().st_size
    if size != entry.bytes:
        yield BlobTruncatedError(f"blob {entry.digest}: {size} bytes on disk, the manifest says {entry.bytes}")
        return
    for unit in entry.units:
        try:
            repertoire.read_unit(entry, unit, manifest.base)
        except RepertoireError as error:
            yield error
    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {}).get("greenroom", "null"))
    except (SafetensorError, ValueError) as error:
        yield TensorMismatchError(f"blob {entry.digest}: the header cannot be read: {error}")
        return
    wanted = {"kind": "expert_set", "scale": entry.scale, "task": entry.task}
    if config != wanted:
        yield TensorMismatchError(f"blob {entry.digest}: the configuration is {config}, the manifest says {wanted}")


def _size(repertoire: Repertoire, digest: str) -> int:
    try:
        return repertoire.blob_path(digest).stat().st_size
    except FileNotFoundError:
        return 0
