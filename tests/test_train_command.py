"""`greenroom train` and `greenroom base` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from greenroom.cli import base as base_command
from greenroom.cli.train import train
from runtime.errors import GreenroomError, InvalidInputError, UnknownBaseError
from runtime.model.base import BaseModel
from runtime.model.repertoire import Repertoire


def command() -> typer.Typer:
    app = typer.Typer()
    app.command()(train)
    app.add_typer(base_command.app, name="base")
    return app


def write_tasks(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        rows = "".join(json.dumps({"input": f"{name} {i}", "output": str(i)}) + "\n" for i in range(16))
        for part in ("train", "test"):
            (folder / name / f"{part}.jsonl").write_text(rows)
    return folder


def test_the_command_trains_what_is_missing_and_skips_what_is_there(tiny_base_folder: Path, tmp_path: Path) -> None:
    data = write_tasks(tmp_path / "data", "signs", "letters")
    start = ["train", "--repertoire", str(tmp_path / "rep"), "--data", str(data), "--base", str(tiny_base_folder)]
    quick = ["--max-steps", "2", "--rank", "2", "--dtype", "float32", "--device", "cpu"]
    one = CliRunner().invoke(command(), [*start, *quick, "--task", "signs"])
    assert one.exit_code == 0, one.output
    assert "generation 1: signs added" in one.output
    assert "signs: step 2 of 2, loss" in one.output
    rest = CliRunner().invoke(command(), [*start, *quick])
    assert rest.exit_code == 0, rest.output
    assert "signs: already in the repertoire, skipped" in rest.output
    assert "generation 2: letters added" in rest.output
    assert Repertoire(tmp_path / "rep").manifest().task_names() == ("signs", "letters")
    nothing = CliRunner().invoke(command(), [*start, *quick])
    assert nothing.output.count("skipped") == 2
    assert Repertoire(tmp_path / "rep").head() == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--task", "songs"], InvalidInputError, "task='songs': the data hold signs"),
        (["--rank", "0"], InvalidInputError, "rank=0"),
        (["--device", "tpu"], InvalidInputError, "device='tpu': must be auto, cpu or cuda"),
        (["--base", "no-such-base"], UnknownBaseError, "no-such-base"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(
    tmp_path: Path, options: list[str], error: type[GreenroomError], message: str
) -> None:
    data = write_tasks(tmp_path / "data", "signs")
    arguments = ["train", "--repertoire", str(tmp_path / "rep"), "--data", str(data), *options]
    result = CliRunner().invoke(command(), arguments)
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
    assert not (tmp_path / "rep").exists()


def test_the_command_shows_a_base_and_knows_no_other_name(tiny_base: BaseModel, tiny_base_folder: Path) -> None:
    shown = CliRunner().invoke(command(), ["base", "show", str(tiny_base_folder)])
    assert tiny_base.info.digest in shown.output
    assert "LlamaForCausalLM" in shown.output
    unknown = CliRunner().invoke(command(), ["base", "get", "gpt5"])
    assert isinstance(unknown.exception, UnknownBaseError)
