"""Inventory: what a repertoire and one of its generations hold, in numbers that people ask for.

It reads manifests and file sizes, no tensors, and checks nothing.
Read first: a generation that cannot be read has a row too, with the reason in `fault`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from runtime.errors import NotARepertoireError, RepertoireError
from runtime.model.expert import DTYPES
from runtime.model.manifest import ExpertSet
from runtime.model.repertoire import Repertoire
from runtime.model.signature import signed_by


@dataclass(frozen=True, kw_only=True)
class GenerationRow:
    """One generation in a list.

    Args:
        generation: its number.
        parent: the one that it was made on.
        is_current: HEAD names it.
        num_tasks: tasks.
        num_experts: (layer, expert) pairs of all expert sets.
        parameters: trained parameters of all tasks.
        num_bytes: of all blobs that it names and that are there.
        key_id: the key that claims to have signed it; unchecked.
        fault: why it cannot be read; the numbers are 0 then.
    """

    generation: int
    parent: int | None = None
    is_current: bool
    num_tasks: int = 0
    num_experts: int = 0
    parameters: int = 0
    num_bytes: int = 0
    key_id: str | None
    fault: str | None = None


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """One task of a generation.

    Args:
        task: its name.
        experts: digest of its own expert set; None if it brought none.
        layers: layers in which it has an expert of its own.
        ranks: all ranks that occur in them, ascending.
        dtype: of the stored experts.
        num_bytes: of its expert set.
        expert_parameters: of its expert set.
        trained_parameters: of experts, routers and density.
        top_k: experts per token and layer.
        num_visible: expert sets that its router may choose from.
    """

    task: str
    experts: str | None
    layers: tuple[int, ...]
    ranks: tuple[int, ...]
    dtype: str | None
    num_bytes: int
    expert_parameters: int
    trained_parameters: int
    top_k: int
    num_visible: int


def list_generations(repertoire: Repertoire) -> tuple[GenerationRow, ...]:
    """One row per published generation that is here, ascending.

    Raises:
        NotARepertoireError: nothing was published here.
    """
    head = repertoire.head()
    if head is None:
        raise NotARepertoireError(f"{repertoire.root}: no HEAD, so there is nothing to list")
    return tuple(describe_generation(repertoire, number, head) for number in repertoire.generations())


def describe_generation(repertoire: Repertoire, number: int, head: int | None) -> GenerationRow:
    """The row of one generation; `head` is the current one's number."""
    key_id = signed_by(repertoire.signature(number))
    try:
        manifest = repertoire.manifest(number)
    except RepertoireError as error:
        return GenerationRow(generation=number, is_current=number == head, key_id=key_id, fault=str(error))
    return GenerationRow(
        generation=number,
        parent=manifest.parent,
        is_current=number == head,
        num_tasks=len(manifest.tasks),
        num_experts=sum(len(entry.units) for entry in manifest.experts),
        parameters=sum(task.trained_parameters for task in manifest.tasks),
        num_bytes=blob_bytes(repertoire, manifest.blob_digests()),
        key_id=key_id,
    )


def list_tasks(repertoire: Repertoire, number: int | None = None) -> tuple[TaskRow, ...]:
    """One row per task of a generation, the current one by default, in order of arrival.

    Raises:
        RepertoireError: its manifest cannot be read.
    """
    manifest = repertoire.manifest(number)
    sets = {entry.digest: entry for entry in manifest.experts}
    rows = []
    for task in manifest.tasks:
        own = sets[task.experts] if task.experts else None
        units = own.units if own else ()
        rows.append(
            TaskRow(
                task=task.name,
                experts=task.experts,
                layers=tuple(unit.layer for unit in units),
                ranks=tuple(sorted({rank for unit in units for rank in unit.ranks.values()})),
                dtype=own.dtype if own else None,
                num_bytes=own.bytes if own else 0,
                expert_parameters=_num_parameters(own) if own else 0,
                trained_parameters=task.trained_parameters,
                top_k=task.router.top_k,
                num_visible=len(task.router.visible),
            )
        )
    return tuple(rows)


def blob_bytes(repertoire: Repertoire, digests: Iterable[str]) -> int:
    """Bytes on disk of these blobs; what is missing counts nothing."""
    paths = (repertoire.blob_path(digest) for digest in digests)
    return sum(path.stat().st_size for path in paths if path.is_file())


def _num_parameters(entry: ExpertSet) -> int:
    return sum(unit.bytes for unit in entry.units) // DTYPES[entry.dtype].itemsize
