"""The difference between two generations: what was added, removed and changed, and what they share.

It compares manifests and file sizes; it reads no tensors.
Read first: the two may be any two of one repertoire, in either order; "added" is what only the second one has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runtime.model.inventory import blob_bytes
from runtime.model.manifest import Manifest
from runtime.model.repertoire import Repertoire

_NOT_SETTINGS = {"generation", "parent", "experts", "tasks"}


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Names that differ between two mappings, each in order of arrival.

    Args:
        added: only in the second.
        removed: only in the first.
        changed: in both, with different content.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Share:
    """Some blobs, and their bytes on disk."""

    num_blobs: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What differs between generation `first` and generation `second`.

    Args:
        first: number of the one.
        second: number of the other.
        tasks: by name; changed if anything of it is.
        expert_sets: by digest; their content is their name, so none can be changed.
        routers: by task; changed if weights, top_k or visible set are.
        settings: other fields of the manifest that differ.
        shared: blobs that both need.
        only_first: blobs that only the first needs.
        only_second: blobs that only the second needs.
    """

    first: int
    second: int
    tasks: Changes
    expert_sets: Changes
    routers: Changes
    settings: tuple[str, ...]
    shared: Share
    only_first: Share
    only_second: Share


def compare(repertoire: Repertoire, first: int, second: int) -> Difference:
    """Compare two generations.

    Raises:
        RepertoireError: a manifest cannot be read.
    """
    one, two = repertoire.manifest(first), repertoire.manifest(second)
    blobs_one, blobs_two = one.blob_digests(), two.blob_digests()

    def share(digests: frozenset[str]) -> Share:
        return Share(num_blobs=len(digests), num_bytes=blob_bytes(repertoire, digests))

    return Difference(
        first=first,
        second=second,
        tasks=_changes({task.name: task for task in one.tasks}, {task.name: task for task in two.tasks}),
        expert_sets=_changes(
            {entry.digest: entry.digest for entry in one.experts}, {entry.digest: entry.digest for entry in two.experts}
        ),
        routers=_changes(
            {task.name: task.router for task in one.tasks}, {task.name: task.router for task in two.tasks}
        ),
        settings=tuple(
            field
            for field in Manifest.model_fields
            if field not in _NOT_SETTINGS and getattr(one, field) != getattr(two, field)
        ),
        shared=share(blobs_one & blobs_two),
        only_first=share(blobs_one - blobs_two),
        only_second=share(blobs_two - blobs_one),
    )


def _changes(one: Mapping[str, object], two: Mapping[str, object]) -> Changes:
    return Changes(
        added=tuple(name for name in two if name not in one),
        removed=tuple(name for name in one if name not in two),
        changed=tuple(name for name in one if name in two and one[name] != two[name]),
    )
