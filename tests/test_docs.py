"""Documents that can rot: the list of files, and every command and snippet that a reader might type."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from greenroom.cli.main import app

ROOT = Path(__file__).parent.parent
PACKAGES = ("greenroom", "runtime", "training", "exporters")
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def files_as_listed() -> str:
    """The list of files as docs/ARCHITECTURE.md should hold it."""
    lines = []
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        if path.name == "__init__.py" or "pb" in path.relative_to(ROOT).parts:
            continue
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring, path
        lines.append(f"- `{path.relative_to(ROOT).as_posix()}`: {docstring.splitlines()[0]}")
    return "\n".join(lines)


def commands(document: Path) -> list[str]:
    """Every `greenroom ...` or `make ...` line of the document's shell blocks, continuation lines joined."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.strip().startswith("#")]


ALL_COMMANDS = [(document.name, line) for document in DOCUMENTS for line in commands(document)]


def test_the_list_of_files_says_what_the_files_say() -> None:
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    listed = re.search(r"<!-- files -->\n(.*)\n<!-- /files -->", text, flags=re.DOTALL)
    assert listed is not None
    assert listed[1].strip() == files_as_listed()


@pytest.mark.parametrize(("document", "line"), ALL_COMMANDS, ids=[f"{name}: {line}" for name, line in ALL_COMMANDS])
def test_a_command_in_the_documents_exists_with_its_options(document: str, line: str) -> None:
    words = [word for word in shlex.split(line) if word != "&"]
    while re.match(r"[A-Z_]+=", words[0]):  # a variable of the environment before the command
        del words[0]
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert words[1] in targets, f"{document}: no such target"
        return
    if words[0] in {"git", "export"}:
        return
    if words[0] == "python":
        script = ROOT / words[1]
        assert script.is_file(), f"{document}: {words[1]} does not exist"
        return
    assert words[0].removeprefix(".venv/bin/") == "greenroom", f"{document}: {line}"
    command = get_command(app)
    rest = words[1:]
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    used = {word.split("=")[0] for word in rest if word.startswith("--")}
    assert used <= known | {"--help"}, f"{document}: {line}"
    assert not hasattr(command, "commands") or not rest, f"{document}: {rest[0]} is no subcommand"


def test_the_documents_show_the_two_commands_first() -> None:
    assert [line for name, line in ALL_COMMANDS if name == "README.md" and line.startswith("make")][:2] == [
        "make demo",
        "make test",
    ]


def test_every_subcommand_explains_itself() -> None:
    for name in get_command(app).commands:  # type: ignore[attr-defined]
        result = CliRunner().invoke(app, [name, "--help"])
        assert result.exit_code == 0, result.output
        assert "Usage:" in result.output
