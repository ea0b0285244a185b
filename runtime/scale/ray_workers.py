"""Workers of an offline run on Ray Data: actors with an engine each, which take bundles of shards.

It knows nothing of files: the process that runs the job reads rows and keeps what comes back.
Read first: Ray Data starts the actors, hands bundles out, restarts actors that die and runs their bundles again. A
shard is computed the same way everywhere, so it does not matter who did it, nor whether it was begun twice.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from runtime.batch.answering import Answered, answer, locate
from runtime.batch.rows import Location
from runtime.batch.workers import Piece
from runtime.engine.engine import Engine
from runtime.errors import InvalidInputError
from runtime.scale.cluster import ray_module

BUNDLES_PER_WORKER = 4
"""So many bundles a worker gets of a large run, at least: more level the work out, fewer keep a task together."""

Kind = Literal["locate", "answer"]


class RayWorkers:
    """As `runtime.batch.workers.Workers`, on the cluster that is connected.

    Args:
        build: makes an engine, not started; called once in each actor, and sent there by its module's name.
        num_workers: actors.
        num_cpus: that Ray reserves for each.
        num_gpus: likewise.

    Raises:
        InvalidInputError: a number that cannot be used, or Ray is not installed.
    """

    def __init__(
        self, build: Callable[[], Engine], *, num_workers: int, num_cpus: float = 1, num_gpus: float = 0
    ) -> None:
        if num_workers < 1:
            raise InvalidInputError("ray_workers", num_workers, "must be at least 1")
        ray_module()
        self._build = build
        self._num_workers = num_workers
        self._resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}

    def locate(self, pieces: Iterable[Piece]) -> Iterator[tuple[int, tuple[Location, ...]]]:
        """Chunks, as they are done."""
        return self._run("locate", pieces)

    def answer(self, pieces: Iterable[Piece]) -> Iterator[tuple[int, Answered]]:
        """Shards, as they are done; those of one task go to one worker, as far as that leaves work for the others."""
        return self._run("answer", pieces)

    def _run(self, kind: Kind, pieces: Iterable[Piece]) -> Iterator[Any]:
        bundles = bundled(list(pieces), num_workers=self._num_workers)
        if not bundles:
            return
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)  # whoever runs the job shows how far it is
        rows = [{"bundle": pickle.dumps(bundle)} for bundle in bundles]
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Worker,
            fn_constructor_args=(self._build, kind),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(self._num_workers, len(rows)), max_tasks_in_flight_per_actor=1),
            **self._resources,
        )
        for row in done.iter_rows():
            yield from pickle.loads(row["done"])  # noqa: S301 - from our own workers


class Worker:
    """What an actor runs.

    Args:
        build: makes its engine.
        kind: what it does with pieces.
    """

    def __init__(self, build: Callable[[], Engine], kind: Kind) -> None:
        self._work = locate if kind == "locate" else answer
        self._engine = build()
        self._engine.start()

    def __call__(self, batch: Mapping[str, Sequence[bytes]]) -> dict[str, list[bytes]]:
        """Do the bundles of a batch of rows."""
        done = []
        for row in batch["bundle"]:
            bundle: list[Piece] = pickle.loads(row)  # noqa: S301 - from our own driver
            done.append(pickle.dumps([(number, self._work(self._engine, prompts)) for number, prompts in bundle]))
        return {"done": done}


def bundled(pieces: Sequence[Piece], *, num_workers: int) -> list[list[Piece]]:
    """Neighbours together: a bundle ends where the first task of a piece changes, and where it has its share."""
    share = max(1, -(-len(pieces) // (num_workers * BUNDLES_PER_WORKER)))
    bundles: list[list[Piece]] = []
    before: str | None = None
    for number, prompts in pieces:
        task = prompts[0].task if prompts else None
        if not bundles or len(bundles[-1]) >= share or task != before:
            bundles.append([])
        bundles[-1].append((number, prompts))
        before = task
    return bundles
