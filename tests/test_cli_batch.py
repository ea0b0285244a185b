"""`greenroom batch` as a user runs it: answers in a file, bad rows in another, an exit code that tells, and kill -9."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections.abc import Callable
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


def test_a_bad_row_is_left_out_and_makes_the_exit_code_1(
    three_tasks: Workshop, tiny_base_folder: Path, source: Path, tmp_path: Path
) -> None:
    source.write_text(source.read_text() + "{broken\n")
    result = run(three_tasks, tiny_base_folder, source, tmp_path / "out.jsonl")
    assert result.exit_code == 1, result.output
    assert f"rows that were left out, and why: {tmp_path}/out.jsonl.bad.jsonl" in result.stderr
    (bad,) = [json.loads(line) for line in (tmp_path / "out.jsonl.bad.jsonl").read_text().splitlines()]
    assert (bad["line"], bad["field"], bad["reason"]) == (4, "line", "INVALID_FIELD")
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


def test_a_killed_process_is_taken_up_by_the_same_command_and_loses_no_row(
    three_tasks: Workshop, tiny_base_folder: Path, prototypes: dict[str, str], tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    texts = list(prototypes.values())
    source.write_text("".join(json.dumps({"input": texts[i % 3], "n": i}) + "\n" for i in range(60)))
    more = ("--shard-rows", "4", "--threads", "1", "--max-tokens", "24")
    whole = run(three_tasks, tiny_base_folder, source, tmp_path / "whole.jsonl", *more)
    assert whole.exit_code == 0, whole.output
    target = tmp_path / "out.jsonl"
    where = ["--repertoire", str(three_tasks.repertoire.root), "--base", str(tiny_base_folder), "--max-tokens", "3"]
    command = [sys.executable, "-m", "greenroom.cli.main", "batch", str(source), str(target), *where, *more]
    reached = tmp_path / "out.jsonl.work" / "answers-000005.json"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: reached.is_file() or target.exists(), process)
        process.kill()
    assert not target.exists(), "killed in time"
    again = run(three_tasks, tiny_base_folder, source, target, *more)
    assert again.exit_code == 0, again.output
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert json.loads((tmp_path / "out.jsonl.report.json").read_text())["shards_resumed"] >= 6


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, "the process ended by itself"
        assert time.monotonic() < deadline
        select.select([], [], [], 0.005)


def test_openai_files_go_in_and_out(three_tasks: Workshop, tiny_base_folder: Path, tmp_path: Path) -> None:
    body = {"model": "green", "messages": [{"role": "user", "content": "12 34"}], "max_tokens": 2}
    request = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(request) + "\n" + json.dumps({**request, "body": {**body, "n": 3}}) + "\n")
    result = run(three_tasks, tiny_base_folder, source, tmp_path / "out.jsonl", "--from", "openai")
    assert result.exit_code == 1, result.output
    (line,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (line["custom_id"], line["response"]["body"]["model"]) == ("a", "green")
    (bad,) = [json.loads(line) for line in (tmp_path / "out.jsonl.bad.jsonl").read_text().splitlines()]
    assert bad["error"]["param"] == "body.n"
