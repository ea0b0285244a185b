"""House rules that a machine can check: sizes, docstrings, file names, and that the project speaks of itself alone.

It does not know what good code is.
Read first: generated stubs are exempt from all but the last rule.
"""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("greenroom", "runtime", "training", "exporters")
TEXT_SUFFIXES = {".py", ".pyi", ".md", ".toml", ".txt", ".proto", ".json", ".yml", ".yaml", ""}
MADE_BY_TOOLS = {"build", "dist", "__pycache__"}
MAX_LINES = 350
MEDIAN_LINES = 120
EMPTY_NAMES = {"manager", "handler", "helper", "helpers", "util", "utils", "common", "misc"}
# Written in two parts, so that this file does not find itself.
FOREIGN_PATHS = ("/" + "work/", "../" + "shared")


def files_under(*folders: Path) -> list[Path]:
    found = (path for folder in folders for path in folder.rglob("*.py"))
    return sorted(path for path in found if "pb" not in path.relative_to(ROOT).parts)


CORE_FILES = files_under(*(ROOT / package for package in PACKAGES))
ALL_FILES = files_under(*(ROOT / folder for folder in (*PACKAGES, "tests", "benchmarks")))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def docstring_of(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


@pytest.mark.parametrize("path", ALL_FILES, ids=name_of)
def test_a_file_starts_with_a_docstring(path: Path) -> None:
    assert docstring_of(path)


@pytest.mark.parametrize("path", CORE_FILES, ids=name_of)
def test_a_core_file_is_short_or_gives_the_reason_for_its_length(path: Path) -> None:
    assert num_lines(path) <= MAX_LINES or "length" in docstring_of(path)


def test_the_median_core_file_is_small() -> None:
    assert statistics.median(num_lines(path) for path in CORE_FILES if path.stem != "__init__") <= MEDIAN_LINES


@pytest.mark.parametrize("path", CORE_FILES, ids=name_of)
def test_a_file_is_named_after_what_it_does(path: Path) -> None:
    assert EMPTY_NAMES.isdisjoint(path.stem.split("_"))


@pytest.mark.parametrize("path", CORE_FILES, ids=name_of)
def test_a_package_file_holds_nothing_but_a_docstring_and_re_exports(path: Path) -> None:
    if path.stem == "__init__":
        body = ast.parse(path.read_text(encoding="utf-8")).body[1:]
        allowed = (ast.ImportFrom, ast.Assign) if path.parent.name == "greenroom" else ()
        assert [type(node).__name__ for node in body if not isinstance(node, allowed)] == []


def test_test_files_lie_flat_and_make_no_package() -> None:
    names = [name_of(path) for path in (ROOT / "tests").rglob("*.py")]
    assert [name for name in names if name.count("/") != 1 or name.endswith("__init__.py")] == []


def is_ours(path: Path) -> bool:
    """Whether a person wrote the file: not a tool's folder, which are named here or hidden (but .ci is ours)."""
    folders = path.relative_to(ROOT).parts[:-1]
    return not any(part in MADE_BY_TOOLS or (part.startswith(".") and part != ".ci") for part in folders)


def test_no_file_names_a_place_outside_the_project() -> None:
    found = []
    for path in ROOT.rglob("*"):
        if is_ours(path) and path.suffix in TEXT_SUFFIXES and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            found += [f"{name_of(path)}: {foreign}" for foreign in FOREIGN_PATHS if foreign in text]
    assert found == []
