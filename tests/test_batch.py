"""Offline batch: order, bad lines, carried fields, and an output that appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from repertoires import Workshop

from runtime.batch import BatchReport, run_batch
from runtime.engine.engine import Engine
from runtime.engine.request import SamplingParams
from runtime.errors import DataError

MakeEngine = Callable[..., Engine]


def run(engine: Engine, source: Path, target: Path) -> tuple[BatchReport, list[str], list[int]]:
    bad: list[str] = []
    progress: list[int] = []
    report = run_batch(
        engine,
        source,
        target,
        sampling=SamplingParams(max_tokens=4, ignore_eos=True),
        on_progress=progress.append,
        on_bad_line=lambda error: bad.append(str(error)),
    )
    return report, bad, progress


def test_rows_come_out_in_order_with_their_own_fields_and_a_bad_line_costs_only_itself(
    three_tasks: Workshop, make_engine: MakeEngine, prototypes: dict[str, str], tmp_path: Path
) -> None:
    rows = [{"input": text, "id": i, "output": "wanted"} for i, text in enumerate(prototypes.values())] * 5
    lines = [json.dumps(row) for row in rows]
    lines[3] = '{"input": broken'
    lines[7] = '{"text": "no input"}'
    lines[8] = '{"input": "x", "answer": "mine"}'
    lines[9] = '{"input": "x", "task": "purple"}'
    lines[10] = '{"input": "x", "max_tokens": "many"}'
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join([*lines, "", ""]))
    engine = make_engine(three_tasks, max_running=2)
    report, bad, progress = run(engine, source, target)
    out = [json.loads(line) for line in target.read_text().splitlines()]
    kept = [row for i, row in enumerate(rows) if i not in {3, 7, 8, 9, 10}]
    assert [{key: row[key] for key in ("input", "id", "output")} for row in out] == kept
    assert [row["routing"]["task"] for row in out] == [list(prototypes)[row["id"]] for row in kept]
    assert all(row["answer"] and row["usage"]["completion_tokens"] == 4 for row in out)
    assert [line.removeprefix(f"{source}:").split(":")[0] for line in bad] == ["4", "8", "9", "10", "11"]
    assert "is not JSON" in bad[0]
    assert "input=None: must be text" in bad[1]
    assert "max_tokens='many'" in bad[4]
    assert progress == list(range(1, 16))
    assert (report.rows, report.answered, report.failed, report.tokens) == (15, 10, 5, 40)
    assert report.expert_loads == 6, "three sets of two layers, each read once"


def test_a_pinned_task_and_a_length_of_the_row_win_over_the_defaults(
    three_tasks: Workshop, make_engine: MakeEngine, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"input": "x", "task": "red", "max_tokens": 2}\n')
    run(make_engine(three_tasks), source, target)
    row = json.loads(target.read_text())
    assert (row["routing"]["how"], row["usage"]["completion_tokens"]) == ("pinned", 2)


def test_an_interrupted_run_leaves_the_old_output_and_no_rubbish(
    three_tasks: Workshop, make_engine: MakeEngine, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"input": "x"}\n' * 3)
    target.write_text("old")

    def interrupt(_done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_batch(
            make_engine(three_tasks),
            source,
            target,
            sampling=SamplingParams(max_tokens=2),
            on_progress=interrupt,
            on_bad_line=lambda _error: None,
        )
    assert target.read_text() == "old"
    assert sorted(path.name for path in tmp_path.glob("*.jsonl*")) == ["in.jsonl", "out.jsonl"]


def test_a_source_that_is_not_there_is_named(three_tasks: Workshop, make_engine: MakeEngine, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: cannot be read"):
        run(make_engine(three_tasks), tmp_path / "nowhere.jsonl", tmp_path / "out.jsonl")
