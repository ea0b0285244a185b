"""`greenroom batch` as a user runs it: answers in a file, bad lines on stderr, an exit code that tells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from repertoires import Workshop
from typer.testing import CliRunner, Result

from greenroom.cli.main import app


def run(workshop: Workshop, base: Path, source: Path, target: Path, *more: str) -> Result:
    where = ["--repertoire", str(workshop.repertoire.root), "--base", str(base)]
    return CliRunner().invoke(app, ["batch", str(source), str(target), *where, "--max-tokens", "3", *more])


@pytest.fixture
def source(tmp_path: Path, prototypes: dict[str, str]) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"input": text}) + "\n" for text in prototypes.values()))
    return path


def test_every_row_is_answered_by_its_task(
    three_tasks: Workshop, tiny_base_folder: Path, source: Path, prototypes: dict[str, str], tmp_path: Path
) -> None:
    result = run(three_tasks, tiny_base_folder, source, tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["routing"]["task"] for row in rows] == list(prototypes)
    assert "3 of 3 rows answered" in result.stderr


def test_a_bad_line_is_named_and_makes_the_exit_code_1(
    three_tasks: Workshop, tiny_base_folder: Path, source: Path, tmp_path: Path
) -> None:
    source.write_text(source.read_text() + "{broken\n")
    result = run(three_tasks, tiny_base_folder, source, tmp_path / "out.jsonl")
    assert result.exit_code == 1
    assert f"skipped {source}:4: line='{{broken': is not JSON" in " ".join(result.stderr.split())
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3


def test_what_cannot_work_is_said_before_the_model_is_loaded(
    three_tasks: Workshop, tiny_base_folder: Path, source: Path, tmp_path: Path
) -> None:
    for wanted, more in (
        ("source=", (tmp_path / "nowhere.jsonl", tmp_path / "out.jsonl")),
        ("its folder does not exist", (source, tmp_path / "no" / "out.jsonl")),
    ):
        result = run(three_tasks, tiny_base_folder, *more)
        assert result.exit_code == 2
        assert wanted in result.stderr
    result = run(three_tasks, tiny_base_folder, source, tmp_path / "out.jsonl", "--kv-memory", "lots")
    assert result.exit_code == 2
    assert "kv_memory='lots'" in result.stderr
