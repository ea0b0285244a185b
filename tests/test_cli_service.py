"""`greenroom serve` and `greenroom ask` as people run them, and errors as one line.

It does not know models: the engine plays a script.
Read first: `run` is the installed command with its arguments, in this process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from scripted_engine import ScriptedEngine
from serving import Serving
from typer.testing import CliRunner, Result

from greenroom.cli.engine_flags import parse_size
from greenroom.cli.main import OneLineErrors, app
from greenroom.cli.serve import write_atomically
from runtime.errors import InvalidInputError, UnknownTaskError


@pytest.fixture
def target() -> Iterator[str]:
    with Serving(ScriptedEngine({"task": UnknownTaskError("no task 'x'")})) as serving:
        yield serving.target


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_one_prompt_is_streamed_and_summed_up(target: str) -> None:
    result = run("ask", "one two three", "--server", target)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("one two three\n")
    for part in ("orders", "located", "0.125", "disk 0.0 MiB 250 ms", "abababab x4", "1.5"):
        assert part in result.stdout


def test_several_prompts_are_answered_in_their_order(target: str) -> None:
    result = run("ask", "first [bold]", "second", "--server", target, "--task", "dates")
    assert result.exit_code == 0, result.stderr
    first, second = result.stdout.index("> first [bold]\nfirst [bold]\n"), result.stdout.index("> second\nsecond\n")
    assert first < second
    assert result.stdout.count("pinned") == 2


def test_weights_of_tasks_are_named_one_by_one_and_their_shares_shown(target: str) -> None:
    result = run("ask", "a", "--server", target, "--task-weight", "orders=0.7", "--task-weight", "dates=0.3")
    assert result.exit_code == 0, result.stderr
    for part in ("0.3 dates", "0.7 orders", "weighted"):
        assert part in result.stdout
    bad = run("ask", "a", "--server", target, "--task-weight", "orders")
    assert (bad.exit_code, "task-weight='orders': is TASK=NUMBER" in bad.stderr) == (2, True)


def test_json_has_a_line_per_prompt(target: str) -> None:
    result = run("ask", "a b", "refuse task", "--server", target, "--json", "--max-tokens", "3")
    answered, refused = map(json.loads, result.stdout.splitlines())
    assert (answered["prompt"], answered["text"], answered["routing"]["task"]) == ("a b", "a b", "orders")
    assert answered["usage"]["tokens_per_s"] == 1.0
    assert (refused["prompt"], refused["error"]["code"], refused["error"]["reason"]) == (
        "refuse task",
        "NOT_FOUND",
        "UNKNOWN_TASK",
    )
    assert result.exit_code == 1


def test_a_refused_prompt_costs_its_line_and_the_exit_code(target: str) -> None:
    result = run("ask", "refuse task", "fine", "--server", target)
    assert result.exit_code == 1
    assert result.stderr.startswith("greenroom: UNKNOWN_TASK: no task 'x' (request ")
    assert len(result.stderr.splitlines()) == 1
    assert "> fine\nfine\n" in result.stdout


def test_an_invalid_option_exits_with_2(target: str) -> None:
    result = run("ask", "x", "--server", target, "--temperature", "-1")
    assert result.exit_code == 2
    assert "sampling.temperature=-1.0" in result.stderr


@pytest.mark.parametrize("arguments", [("a", "b", "--stream"), ("a", "--json", "--stream")])
def test_streaming_takes_one_prompt_and_no_json(arguments: tuple[str, ...]) -> None:
    result = run("ask", *arguments, "--server", "127.0.0.1:1")
    assert result.exit_code == 2
    assert result.stderr.startswith("greenroom: stream=True")


def test_no_server_is_one_line_and_exit_code_1() -> None:
    result = run("ask", "x", "--server", "127.0.0.1:1")
    assert result.exit_code == 1
    assert result.stderr.startswith("greenroom: UNAVAILABLE: ")
    assert len(result.stderr.splitlines()) == 1


def test_a_size_that_is_none_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    result = run("serve", "--repertoire", str(tmp_path), "--expert-memory", "much")
    assert result.exit_code == 2
    assert result.stderr.startswith("greenroom: expert_memory='much'")


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("1", 1), ("64MiB", 64 << 20), ("1.5 GiB", 3 << 29), ("2kb", 2000), ("7B", 7), ("1TB", 10**12), ("3KiB", 3072)],
)
def test_sizes_are_read_as_people_say_them(text: str, num_bytes: int) -> None:
    assert parse_size("kv_memory", text) == num_bytes


@pytest.mark.parametrize("text", ["", "MiB", "-1", "0", "0.1B", "1 XB", "1iB", "1e3"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="kv_memory="):
        parse_size("kv_memory", text)


def failing(error: Exception) -> typer.Typer:
    """The same error handling, around a command that fails."""
    broken = typer.Typer(cls=OneLineErrors, pretty_exceptions_enable=False)

    @broken.callback()
    def options(*, debug: bool = False) -> None:
        pass

    @broken.command()
    def fail() -> None:
        raise error

    return broken


def test_an_unexpected_error_is_one_line_too() -> None:
    result = CliRunner().invoke(failing(ZeroDivisionError("two\nlines")), ["fail"])
    assert (result.exit_code, result.stderr) == (
        1,
        "greenroom: unexpected ZeroDivisionError: two lines (--debug shows where)\n",
    )


def test_debug_lets_the_exception_through() -> None:
    result = CliRunner().invoke(failing(ZeroDivisionError("x")), ["--debug", "fail"])
    assert isinstance(result.exception, ZeroDivisionError)


def test_the_ready_file_is_written_whole(tmp_path: Path) -> None:
    write_atomically(tmp_path / "ready", "50051\n")
    assert [path.name for path in tmp_path.iterdir()] == ["ready"]
    assert (tmp_path / "ready").read_text() == "50051\n"


def test_help_names_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    flags = {
        "serve": "repertoire base host port expert-memory kv-memory max-running dtype threads grace ready-file",
        "ask": "server task base-only raw max-tokens temperature seed stream no-stream json timeout",
    }
    for command, names in flags.items():
        shown = run(command, "--help").stdout
        assert [name for name in names.split() if f"--{name} " not in shown] == []
