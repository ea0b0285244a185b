"""Offline runs on Ray Data: the answers of one process, also when a worker is killed; and life without Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from ray_engines import build_noted, tiny_flags
from repertoires import Workshop
from test_batch import job_for, lines_of

from greenroom.cli.build_engine import build_engine
from runtime.batch.answering import Answered
from runtime.batch.rows import Location, make_prompt
from runtime.batch.run import run_batch
from runtime.batch.workers import OneEngine, Piece
from runtime.errors import InvalidInputError, UnavailableError
from runtime.scale.cluster import connected
from runtime.scale.ray_workers import RayWorkers, bundled

ROOT = Path(__file__).parent.parent


class Killing:
    """Ray's workers, one of which is killed when the first answers have come."""

    def __init__(self, workers: RayWorkers, notes: Path) -> None:
        self._workers, self._notes = workers, notes
        self.killed = 0

    def locate(self, pieces: Iterable[Piece]) -> Iterator[tuple[int, tuple[Location, ...]]]:
        return self._workers.locate(pieces)

    def answer(self, pieces: Iterable[Piece]) -> Iterator[tuple[int, Answered]]:
        for note in self._notes.iterdir():
            note.unlink()
        for one in self._workers.answer(pieces):
            for note in [] if self.killed else self._notes.iterdir():
                with suppress(ProcessLookupError):
                    os.kill(int(note.name), signal.SIGKILL)
                    self.killed += 1
                    break
            yield one


@pytest.mark.usefixtures("ray_address")
def test_two_workers_of_which_one_is_killed_give_the_bytes_of_one_process(
    three_tasks: Workshop, tiny_base_folder: Path, prototypes: dict[str, str], tmp_path: Path
) -> None:
    source, notes = tmp_path / "in.csv", tmp_path / "notes"
    notes.mkdir()
    texts = list(prototypes.values())
    source.write_text("input,n\n" + "".join(f"{texts[i % 3]} {'x' * (i % 5)},{i}\n" for i in range(60)))
    flags = tiny_flags(three_tasks.repertoire.root, tiny_base_folder, max_running=4)
    engine = build_engine(flags)
    engine.start()
    alone = job_for(engine, source, tmp_path / "alone.jsonl", shard_rows=5)
    shared = job_for(engine, source, tmp_path / "shared.jsonl", shard_rows=5)
    run_batch(alone, OneEngine(engine), on_progress=lambda _progress: None)
    engine.close()
    workers = Killing(RayWorkers(partial(build_noted, flags, notes), num_workers=2), notes)
    report = run_batch(shared, workers, on_progress=lambda _progress: None)
    assert workers.killed == 1
    assert (report.rows, report.answered, report.shards) == (60, 60, 12)
    assert (tmp_path / "shared.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    assert len(lines_of(tmp_path / "shared.jsonl")) == 60


def test_bundles_keep_a_task_together_and_leave_work_for_every_worker() -> None:
    tasks = ["red"] * 20 + ["green"] * 3 + ["blue"]
    pieces = [(i, (make_prompt(i, "x", task, {"max_tokens": 1}),)) for i, task in enumerate(tasks)]
    bundles = bundled(pieces, num_workers=2)
    assert [piece for bundle in bundles for piece in bundle] == pieces
    assert [len(bundle) for bundle in bundles] == [3, 3, 3, 3, 3, 3, 2, 3, 1]
    assert bundled([], num_workers=2) == []


def test_a_cluster_that_is_not_there_is_unavailable() -> None:
    with pytest.raises(UnavailableError, match="no Ray cluster at"), connected("127.0.0.1:1"):
        pass


def test_no_workers_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="ray_workers=0"):
        RayWorkers(partial(build_engine), num_workers=0)


BLOCKED = """
    import sys

    sys.modules.update(dict.fromkeys(["ray", "pyarrow", "pandas"]))  # as if they were not installed
    import importlib, pathlib
    needs_ray = {"runtime.scale.expert_router"}
    for path in sorted(pathlib.Path("runtime").rglob("*.py")) + sorted(pathlib.Path("greenroom").rglob("*.py")):
        name = ".".join(path.with_suffix("").parts)
        if "triton" not in name and name not in needs_ray:
            importlib.import_module(name.removesuffix(".__init__"))
    from runtime.errors import InvalidInputError
    from runtime.scale.ray_workers import RayWorkers
    from runtime.batch.sources import parquet
    for wanted in (lambda: RayWorkers(print, num_workers=1), parquet):
        try:
            wanted()
        except InvalidInputError as error:
            print(error)
"""


def test_everything_imports_without_ray_and_says_what_to_install() -> None:
    code = textwrap.dedent(BLOCKED)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert "greenroom[scale]" in done.stdout.splitlines()[0]
    assert "greenroom[batch]" in done.stdout.splitlines()[1]
