"""Visible sets: what a sequence of a task wants in memory, and how each part of it is read and checked.

It knows nothing of budgets or threads; reads run on the thread that calls them.
Read first: nothing is read to say what is wanted, so it costs no disk to ask.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock

import numpy as np
import torch

from runtime.errors import RankLimitError, UnboundExpertError
from runtime.kernels.inspection import Inspected, Inspector
from runtime.memory.buffers import Buffers
from runtime.memory.kept_dtype import in_dtype, kept_bytes, kept_dtype
from runtime.memory.keys import ROUTERS, routers_name
from runtime.memory.wanted import VisibleSet, Wanted
from runtime.model.expert import DTYPES, Expert, LowRank, UnitForm, unit_tensors
from runtime.model.generation import Generation
from runtime.model.manifest import BaseRef, ExpertSet, Unit
from runtime.model.mixture import Mixture
from runtime.model.repertoire import Repertoire

_SAME_SIZE = {2: torch.int16, 4: torch.int32}
_KEPT = 256  # sets whose description is kept; making one anew costs microseconds per (layer, expert)


class VisibleSets:
    """Describes what tasks want.

    Args:
        repertoire: where it is read from.
        max_rank: an expert of a higher rank is refused; memory and time of a step follow the ranks.
        dtype: that experts are kept in; None leaves them as they are stored.
        inspector: looks at what was read.
    """

    def __init__(
        self,
        repertoire: Repertoire,
        *,
        max_rank: int,
        dtype: torch.dtype | None = None,
        inspector: Inspector | None = None,
    ) -> None:
        self._repertoire = repertoire
        self._max_rank = max_rank
        self._dtype = dtype
        self._inspector = inspector or Inspector()
        self._lock = Lock()
        self._kept: OrderedDict[tuple[int, str], VisibleSet] = OrderedDict()
        self._buffers = Buffers()

    def of(self, generation: Generation, task: str) -> VisibleSet:
        """What a sequence of this task can touch: its routers first, then experts by layer, the most used first.

        Raises:
            UnknownTaskError: no such task.
            RepertoireError: the task is quarantined.
        """
        key = (generation.manifest.generation, task)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = self._make(generation, task)
        with self._lock:
            self._kept[key] = made
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return made

    def of_all(self, generation: Generation, tasks: Sequence[str]) -> VisibleSet:
        """What several tasks can touch together, each thing once, in the order of `of`; `routers` only of a single one.

        Raises:
            UnknownTaskError, RepertoireError: as `of`.
        """
        if len(tasks) == 1:
            return self.of(generation, tasks[0])
        wanted = {each.key: each for task in tasks for each in self.of(generation, task).wanted}
        in_order = sorted(wanted.values(), key=lambda each: each.key[1])
        return VisibleSet(task=" + ".join(tasks), routers=None, wanted=in_order)

    def routers_of(self, generation: Generation, tasks: Sequence[str]) -> VisibleSet:
        """The routers of tasks alone."""
        whole = self.of_all(generation, tasks)
        routers = [each for each in whole.wanted if each.key[1] == ROUTERS]
        return VisibleSet(task=whole.task, routers=whole.routers, wanted=routers)

    def of_mixture(self, generation: Generation, mixture: Mixture) -> VisibleSet:
        """The experts alone of what a request made of tasks' mixtures."""
        keys = {(entry.digest, unit.layer) for entry, unit in generation.visible_units(mixture)}
        whole = self.of_all(generation, mixture.tasks)
        return VisibleSet(task=mixture.task, routers=None, wanted=[w for w in whole.wanted if w.key in keys])

    def _make(self, generation: Generation, task: str) -> VisibleSet:
        generation.check_task(task)
        manifest = generation.manifest
        units = generation.task_units(task)
        digest = manifest.task(task).router.digest
        routers = (routers_name(digest, generation=manifest.generation, task=task), ROUTERS)
        num_bytes = generation.router_bytes(task)
        read_routers = partial(generation.read_mixture, task)
        wanted = [Wanted(key=routers, task=task, num_bytes=num_bytes, rows=(), read=read_routers)]
        read_units = partial(
            self._repertoire.read_units, base=manifest.base, allocate=self._buffers.take, inspector=self._inspector
        )
        sources = {
            entry.digest: _Source(self._repertoire, entry, manifest.base, partial(read_units, entry))
            for entry, _ in units
        }
        rows: dict[object, tuple[tuple[int, int], ...]] = {}  # one set's layers mostly have the same ranks
        for entry, unit in units:
            form = (entry.layout, *unit.ranks.items())
            if form not in rows:
                shapes = unit_tensors(unit.ranks, manifest.base, entry.layout)
                rows[form] = tuple(_row(name, shape) for name, shape in shapes.items())
            source = sources[entry.digest]
            read = partial(self._read_expert, source, unit)
            key = (entry.digest, unit.layer)
            size = kept_bytes(entry, unit, self._dtype)
            made = Wanted(key=key, task=entry.task, num_bytes=size, rows=rows[form], read=read, fetch=source.fetch)
            wanted.append(made)
        return VisibleSet(task=task, routers=routers, wanted=tuple(wanted))

    def _read_expert(self, source: _Source, unit: Unit) -> Expert:
        digest, data = source.entry.digest, source.take(unit)
        if not unit.ranks:
            raise UnboundExpertError(f"expert set {digest}: layer {unit.layer} binds to no module")
        highest = max(unit.ranks.values())
        if highest > self._max_rank:
            raise RankLimitError(
                f"expert set {digest}: layer {unit.layer} has rank {highest}, this engine takes {self._max_rank}"
            )
        expert, dtype = source.read(unit, data), kept_dtype(source.entry, self._dtype)
        if dtype != DTYPES[source.entry.dtype]:
            return in_dtype(expert, dtype, allocate=self._buffers.take)
        return row_major(expert) if source.entry.layout == "plain" else expert


class _Source:
    """One expert set on disk, and the bytes of those of its units that were fetched and not yet read."""

    def __init__(
        self,
        repertoire: Repertoire,
        entry: ExpertSet,
        base: BaseRef,
        read_units: Callable[[Sequence[Unit]], list[Inspected]],
    ) -> None:
        self.entry = entry
        self._repertoire = repertoire
        self._base = base
        self._read_units = read_units
        self._fetched: dict[int, Inspected] = {}
        self._forms: dict[int, UnitForm] = {}

    def fetch(self, layers: Sequence[int]) -> None:
        """Read the bytes of these layers."""
        units = [unit for unit in self.entry.units if unit.layer in layers]
        self._fetched.update({unit.layer: data for unit, data in zip(units, self._read_units(units), strict=True)})

    def take(self, unit: Unit) -> Inspected | None:
        """The bytes of one that was fetched, which are nobody else's from now on; None of one that was not."""
        return self._fetched.pop(unit.layer, None)

    def read(self, unit: Unit, data: Inspected | None) -> Expert:
        """Check and parse one, after reading it where there are no bytes."""
        if data is None:
            (data,) = self._read_units([unit])
        form = self._forms.get(unit.layer)
        if form is None:
            like = next(iter(self._forms.values()), None)
            form = self._forms[unit.layer] = UnitForm(unit, self.entry, self._base, like=like)
        return self._repertoire.read_unit(self.entry, unit, self._base, data=data, form=form)


def row_major(expert: Expert) -> Expert:
    """The same expert with every B as the transpose of a contiguous [R, out], which kernels can read in place.

    It takes over the expert's memory: each B is turned where it lies, so nothing is held twice.
    """
    updates = {}
    for target, update in expert.updates.items():
        b = update.b
        width, rank = b.shape
        numbers = b.view(_SAME_SIZE[b.dtype.itemsize]).numpy()  # NumPy turns narrow matrices several times faster
        turned = np.ascontiguousarray(numbers.T)  # [R, out]
        numbers.reshape(-1)[:] = turned.reshape(-1)
        updates[target] = LowRank(update.a, b.as_strided((width, rank), (1, width)))
    return Expert(layer=expert.layer, scale=expert.scale, updates=updates)


def _row(name: str, shape: tuple[int, int]) -> tuple[int, int]:
    """(rank, width) of A [R, in], B [out, R], or B transposed."""
    return (shape[1], shape[0]) if name.endswith(".b") else shape
