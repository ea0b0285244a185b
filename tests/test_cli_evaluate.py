"""`greenroom evaluate` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from greenroom.cli.evaluate import evaluate
from runtime.errors import InvalidInputError


def command() -> typer.Typer:
    app = typer.Typer()
    app.command()(evaluate)
    return app


@pytest.fixture
def options(tmp_path: Path, tiny_base_folder: Path) -> list[str]:
    """Two tasks to learn and one that nobody learns, on the tiny base."""
    for name in ("letters", "signs", "songs"):
        (tmp_path / "data" / name).mkdir(parents=True)
        rows = "".join(json.dumps({"input": f"{name} {i}", "output": str(i % 3)}) + "\n" for i in range(16))
        for part in ("train", "test"):
            (tmp_path / "data" / name / f"{part}.jsonl").write_text(rows)
    return [
        *("--data", str(tmp_path / "data"), "--tasks", "letters,signs"),
        *("--output", str(tmp_path / "out" / "result.json"), "--work", str(tmp_path / "work")),
        *("--base", str(tiny_base_folder), "--dtype", "float32", "--device", "cpu"),
        *("--test-rows", "3", "--max-steps", "1", "--rank", "2"),
    ]


def test_the_command_writes_results_a_table_and_a_curve(options: list[str], tmp_path: Path) -> None:
    chosen = ["--methods", "zero_shot,per_task", "--lookalike", "signs"]
    done = CliRunner().invoke(command(), [*options, *chosen])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["tasks"] == ["letters", "signs"]
    assert found["settings"]["held_out"] == ["songs"]
    assert set(found["methods"]) == {"zero_shot", "per_task_oracle", "per_task_locator"}
    assert set(found) >= {"machine", "command", "seeds", "locator"}
    assert str(tmp_path) not in json.dumps(found)
    assert "| base alone |" in (tmp_path / "out" / "result.md").read_text()
    assert (tmp_path / "out" / "result.png").stat().st_size > 1000
    assert "seed 0 per_task after signs" in done.output


def test_what_probing_decided_is_told_task_by_task(options: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(command(), [*options, "--methods", "pgke", "--probe-steps", "1"])
    assert done.exit_code == 0, done.output
    first, second = json.loads((tmp_path / "out" / "result.json").read_text())["growth"]["0"]
    assert (first["task"], first["layers"], first["frequency"]) == ("letters", [1, 2, 3], {})
    assert first["parameters_added"] == first["parameters_everywhere"]
    assert (second["policy"], sorted(second["frequency"])) == ("paper", ["1", "2", "3"])
    assert set(second["layers"]) < {1, 2, 3}
    assert second["parameters_added"] < second["parameters_everywhere"]
    assert (tmp_path / "out" / "result-growth.png").stat().st_size > 1000


def test_a_locator_is_fitted_anew_on_a_finished_run(options: list[str], tmp_path: Path) -> None:
    chosen = ["--methods", "per_task"]
    results = []
    for more in ([], ["--relocate"]):
        done = CliRunner().invoke(command(), [*options, *chosen, *more])
        assert done.exit_code == 0, done.output
        results.append(json.loads((tmp_path / "out" / "result.json").read_text()))
    assert results[0]["locator"] == results[1]["locator"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--tasks", "letters,poems"], "tasks='poems': the data hold letters, signs, songs"),
        (["--tasks", "letters,letters"], "must name every task once"),
        (["--held-out", "signs"], "held_out='signs': is one of the tasks that are learned"),
        (["--lookalike", "songs"], "lookalike='songs': is not one of the tasks letters, signs"),
        (["--methods", "magic"], "methods='magic': must be among zero_shot"),
        (["--seeds", "one"], "seeds='one': must be whole numbers"),
    ],
)
def test_what_cannot_be_compared_is_named(options: list[str], changed: list[str], message: str) -> None:
    done = CliRunner().invoke(command(), [*options, *changed])
    assert isinstance(done.exception, InvalidInputError)
    assert message in str(done.exception)
