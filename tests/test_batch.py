"""Offline runs: what comes out for what goes in, and that it is the same bytes however often a run is interrupted."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from repertoires import Workshop

from runtime.batch.answering import Answered
from runtime.batch.job import Job
from runtime.batch.places import Place
from runtime.batch.plan import unit_sizes
from runtime.batch.progress import BatchReport, Progress
from runtime.batch.rows import Location
from runtime.batch.run import run_batch
from runtime.batch.sources import format_of
from runtime.batch.workers import OneEngine, Piece
from runtime.engine.engine import Engine
from runtime.engine.request import SamplingParams
from runtime.errors import DataError, InvalidInputError, UnavailableError

MakeEngine = Callable[..., Engine]


def job_for(engine: Engine, source: Path | str, target: Path | str, **fields: Any) -> Job:
    is_folder = str(target).endswith("/")
    kind = fields.pop("source_format", None) or format_of(str(source), None)
    return Job(
        source=Place(str(source)),
        source_format=kind,
        target=Place(str(target)),
        target_format=fields.pop("target_format", None) or (kind if is_folder else format_of(str(target), None)),
        target_is_folder=is_folder,
        generation=engine.generation.manifest.generation,
        sizes=unit_sizes(engine.generation),
        budget_bytes=engine.memory.budget_bytes,
        **{"sampling": SamplingParams(max_tokens=4, ignore_eos=True), "shard_rows": 4, **fields},
    )


def run(engine: Engine, source: Path | str, target: Path | str, **fields: Any) -> BatchReport:
    return run_batch(job_for(engine, source, target, **fields), OneEngine(engine), on_progress=lambda _progress: None)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Stopping:
    """An engine's worker that is lost after some pieces."""

    def __init__(self, engine: Engine, pieces: int) -> None:
        self._worker = OneEngine(engine)
        self._left = pieces

    def locate(self, pieces: Iterable[Piece]) -> Iterator[tuple[int, tuple[Location, ...]]]:
        for one in self._worker.locate(pieces):
            self._spend()
            yield one

    def answer(self, pieces: Iterable[Piece]) -> Iterator[tuple[int, Answered]]:
        for one in self._worker.answer(pieces):
            self._spend()
            yield one

    def _spend(self) -> None:
        if not self._left:
            raise UnavailableError("lost")
        self._left -= 1


@pytest.fixture
def rows(prototypes: dict[str, str]) -> list[dict[str, Any]]:
    texts = list(prototypes.values())
    return [{"input": texts[i % 3], "id": i, "output": "wanted"} for i in range(12)]


@pytest.fixture
def source(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_come_out_in_order_with_their_own_fields_and_a_bad_row_costs_only_itself(
    three_tasks: Workshop,
    make_engine: MakeEngine,
    prototypes: dict[str, str],
    rows: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    lines = [json.dumps(row) for row in rows]
    lines[1] = '{"input": broken'
    lines[3] = '{"text": "no input"}'
    lines[5] = '{"input": "x", "answer": "mine"}'
    lines[7] = '{"input": "x", "task": "purple"}'
    lines[8] = '{"input": "x", "max_tokens": "many"}'
    lines[9] = json.dumps({"input": "long " * 300})
    lines[10] = "[]"
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join([*lines, "", ""]))
    report = run(make_engine(three_tasks, max_running=2), source, target)
    out = lines_of(target)
    kept = [rows[i] for i in (0, 2, 4, 6, 11)]
    assert [{key: row[key] for key in ("input", "id", "output")} for row in out] == kept
    assert [row["routing"]["task"] for row in out] == [list(prototypes)[row["id"] % 3] for row in kept]
    assert all(row["answer"] and row["usage"]["completion_tokens"] == 4 for row in out)
    assert all(row["routing"]["how"] == "located" and row["routing"]["generation"] == 3 for row in out)
    bad = lines_of(tmp_path / "out.jsonl.bad.jsonl")
    assert [(row["line"], row["field"], row["reason"]) for row in bad] == [
        (2, "line", "INVALID_FIELD"),
        (4, "input", "INVALID_FIELD"),
        (6, "answer", "INVALID_FIELD"),
        (8, "task", "UNKNOWN_TASK"),
        (9, "max_tokens", "INVALID_FIELD"),
        (10, "input", "INVALID_FIELD"),
        (11, "line", "INVALID_FIELD"),
    ]
    assert "is not JSON" in bad[0]["problem"]
    assert (report.rows, report.answered, report.failed, report.tokens) == (12, 5, 7, 20)
    assert report.tasks == {"blue": 2, "green": 1, "red": 2}
    assert json.loads((tmp_path / "out.jsonl.report.json").read_text())["answered"] == 5
    assert not (tmp_path / "out.jsonl.work").exists()


def test_every_expert_is_read_once_even_if_memory_holds_no_more_than_the_largest_task(
    workshop: Workshop, make_engine: MakeEngine, tmp_path: Path
) -> None:
    names = {"red": "aaaa bbbb cccc", "green": "12 34 56 78 90", "blue": "? ! ? ! ? ! ? !"}
    for name, prototype in names.items():
        workshop.publish(name, prototype, rank=4)
    engine = make_engine(workshop)
    sizes = unit_sizes(engine.generation)
    engine = make_engine(workshop, expert_budget_bytes=sum(sizes["blue"].values()))
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"input": list(names.values())[i % 3]}) + "\n" for i in range(30)))
    report = run(engine, source, tmp_path / "out.jsonl", shard_rows=7)
    assert (report.expert_loads, report.loads_per_expert) == (3, 1.0)
    assert report.tasks == {"blue": 10, "green": 10, "red": 10}


def test_answers_are_those_that_the_engine_gives_to_the_prompt_alone(
    three_tasks: Workshop, make_engine: MakeEngine, source: Path, prototypes: dict[str, str], tmp_path: Path
) -> None:
    run(make_engine(three_tasks), source, tmp_path / "out.jsonl")
    answers = {row["input"]: row["answer"] for row in lines_of(tmp_path / "out.jsonl")}
    for task, text in prototypes.items():
        tokens = three_tasks.reference(text, task, 4).argmax(1).tolist()
        assert answers[text] == three_tasks.base.tokenizer.decode(tokens), task


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_each_format_goes_in_and_out_in_one_file_and_in_parts(
    kind: str, three_tasks: Workshop, make_engine: MakeEngine, source: Path, tmp_path: Path
) -> None:
    engine = make_engine(three_tasks)
    run(engine, source, tmp_path / f"first.{kind}")
    wanted = read_answers(tmp_path / f"first.{kind}")
    assert [row[0] for row in wanted] == [str(i) for i in range(12)]
    assert all(answer and task for _, answer, task in wanted)
    again = tmp_path / f"again.{kind}"
    again.write_bytes(without_answers(tmp_path / f"first.{kind}"))
    report = run(engine, again, f"{tmp_path}/parts/")
    assert report.failed == 0
    parts = sorted((tmp_path / "parts").glob(f"part-*.{kind}"))
    assert [path.name for path in parts] == [f"part-{i:06d}.{kind}" for i in range(3)]
    assert sorted(row for path in parts for row in read_answers(path)) == sorted(wanted)
    assert (tmp_path / "parts" / "report.json").is_file()


def read_answers(path: Path) -> list[tuple[str, str, str]]:
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    elif path.suffix == ".csv":
        with path.open(newline="") as file:
            rows = [{**row, "routing": json.loads(row["routing"])} for row in csv.DictReader(file)]
    else:
        rows = lines_of(path)
    return [(str(row["id"]), row["answer"], row["routing"]["task"]) for row in rows]


def without_answers(path: Path) -> bytes:
    if path.suffix == ".parquet":
        pq.write_table(pq.read_table(path).drop_columns(["answer", "routing", "usage"]), path)
    elif path.suffix == ".csv":
        with path.open(newline="") as file:
            rows = [[row["input"], row["id"]] for row in csv.DictReader(file)]
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["input", "id"], *rows])
    else:
        path.write_text("".join(json.dumps({"input": row["input"], "id": row["id"]}) + "\n" for row in lines_of(path)))
    return path.read_bytes()


@pytest.mark.parametrize("pieces", [0, 1, 2, 4])
@pytest.mark.parametrize("target", ["out.jsonl", "out.parquet", "parts/"])
def test_a_run_that_was_lost_goes_on_and_gives_the_same_bytes(  # noqa: PLR0917 - fixtures
    pieces: int,
    target: str,
    three_tasks: Workshop,
    make_engine: MakeEngine,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("runtime.batch.run.LOCATE_ROWS", 6)
    whole, resumed = f"{tmp_path}/whole/", f"{tmp_path}/resumed/"
    for folder in (whole, resumed):
        Path(folder).mkdir()
    run(make_engine(three_tasks, max_running=3), source, whole + target)
    engine = make_engine(three_tasks, max_running=3)
    job = job_for(engine, source, resumed + target)
    with pytest.raises(UnavailableError):
        run_batch(job, Stopping(engine, pieces), on_progress=lambda _progress: None)
    assert not Path(resumed, "out.jsonl").exists()
    seen: list[Progress] = []
    other = make_engine(three_tasks, max_running=3)
    report = run_batch(job_for(other, source, resumed + target), OneEngine(other), on_progress=seen.append)
    assert report.shards_resumed == max(0, pieces - 2)
    assert next(one.done for one in seen if one.phase == "locating") == 6 * min(pieces, 2)
    assert (report.rows, report.answered, report.tokens) == (12, 12, 48)
    assert answer_bytes(resumed) == answer_bytes(whole)


def answer_bytes(folder: str) -> dict[str, bytes]:
    files = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
    assert not [name for name in files if ".work" in name]
    return {name: path.read_bytes() for name, path in files.items() if "report.json" not in name}


def test_sampling_without_a_seed_is_repeatable_and_differs_from_row_to_row(
    three_tasks: Workshop, make_engine: MakeEngine, tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"input": "aaaa bbbb cccc"}\n' * 6)
    sampling = SamplingParams(max_tokens=8, temperature=2.0, ignore_eos=True)
    for name in ("one.jsonl", "two.jsonl"):
        run(make_engine(three_tasks), source, tmp_path / name, sampling=sampling)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    assert len({row["answer"] for row in lines_of(tmp_path / "one.jsonl")}) > 1


def test_an_unfinished_run_of_another_job_is_not_taken_up(
    three_tasks: Workshop, make_engine: MakeEngine, source: Path, tmp_path: Path
) -> None:
    engine, target = make_engine(three_tasks), tmp_path / "out.jsonl"
    with pytest.raises(UnavailableError):
        run_batch(job_for(engine, source, target), Stopping(engine, 1), on_progress=lambda _progress: None)
    with pytest.raises(InvalidInputError, match=r"sampling\.max_tokens=5: the unfinished run in .* had 4"):
        run(engine, source, target, sampling=SamplingParams(max_tokens=5, ignore_eos=True))
    source.write_text(source.read_text() + '{"input": "x"}\n')
    with pytest.raises(InvalidInputError, match="source_sha256="):
        run(engine, source, target)
    assert run(engine, source, target, fresh=True).answered == 13


def test_parts_of_an_earlier_run_are_not_left_among_the_new_ones(
    three_tasks: Workshop, make_engine: MakeEngine, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "part-000009.jsonl").write_text("old")
    (tmp_path / "parts" / "notes.txt").write_text("mine")
    run(make_engine(three_tasks), source, f"{tmp_path}/parts/")
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [
        "notes.txt",
        *(f"part-{i:06d}.jsonl" for i in range(3)),
        "report.json",
    ]


def test_rows_and_answers_may_lie_behind_urls(
    three_tasks: Workshop, make_engine: MakeEngine, source: Path, tmp_path: Path
) -> None:
    Place("memory://rows/in.jsonl").write(source.read_bytes())
    engine = make_engine(three_tasks)
    run(engine, "memory://rows/in.jsonl", "memory://answers/out.jsonl")
    run(engine, source, tmp_path / "out.jsonl")
    assert Place("memory://answers/out.jsonl").read() == (tmp_path / "out.jsonl").read_bytes()
    assert Place("memory://answers").names() == ["out.jsonl", "out.jsonl.report.json"]


def test_a_broken_expert_costs_only_the_rows_of_its_task(
    three_tasks: Workshop, make_engine: MakeEngine, source: Path, tmp_path: Path
) -> None:
    engine = make_engine(three_tasks)
    digest = engine.generation.manifest.task("blue").experts
    path = next(path for path in three_tasks.repertoire.root.rglob(digest))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    report = run(engine, source, tmp_path / "out.jsonl")
    assert (report.answered, report.failed) == (8, 4)
    bad = lines_of(tmp_path / "out.jsonl.bad.jsonl")
    assert {row["reason"] for row in bad} == {"DIGEST_MISMATCH"}
    assert [row["line"] for row in bad] == [3, 6, 9, 12]


def test_a_source_that_is_not_there_is_named(three_tasks: Workshop, make_engine: MakeEngine, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: cannot be read"):
        run(make_engine(three_tasks), tmp_path / "nowhere.jsonl", tmp_path / "out.jsonl")
