"""The one-way order of the packages, read from the source of every file, imports inside functions included.

It does not know what the imports are for.
Read first: `MAY_IMPORT` is the order; an area may always import itself, and an area that is not in it is an error.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("greenroom", "runtime", "training", "exporters")
LAYERS = (
    ("runtime.errors",),
    ("runtime.kernels",),
    ("runtime.model",),
    ("runtime.memory",),
    ("runtime.engine",),
    ("runtime.batch", "runtime.service"),
    ("runtime.scale",),
)
BELOW = {
    area: {low for layer in LAYERS[:depth] for low in layer} for depth, areas in enumerate(LAYERS) for area in areas
}
MODEL_AND_BELOW = {"runtime.errors", "runtime.kernels", "runtime.model"}
MAY_IMPORT: dict[str, set[str]] = {
    **BELOW,
    "runtime.service": BELOW["runtime.service"] | {"greenroom.pb"},
    "runtime.scale": BELOW["runtime.scale"] | {"greenroom.pb"},
    "training": MODEL_AND_BELOW,
    "exporters": MODEL_AND_BELOW,
    "greenroom.pb": set(),
    "greenroom": {"greenroom.pb"},
    "greenroom.cli": {*BELOW, "training", "exporters", "greenroom", "greenroom.pb"},
}


def area_of(module: str) -> str | None:
    """The area that a dotted name lies in; None for what is not ours."""
    first, *rest = module.split(".")
    if first not in PACKAGES:
        return None
    if first == "greenroom":
        return f"greenroom.{rest[0]}" if rest and rest[0] in {"pb", "cli"} else "greenroom"
    return ".".join([first, *rest[:1]]) if first == "runtime" else first


def imported_modules(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[str]:
    """Dotted names of all imports in a file; `from a import b` gives `a.b`, since b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")[: -node.level + is_package or None] if node.level else []
            yield from (".".join([*parts, *filter(None, [node.module]), alias.name]) for alias in node.names)


def source_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Imports of `module` that its area may not have."""
    area = area_of(module)
    if area == "runtime" and is_package:
        allowed: set[str] = set()
    elif area not in MAY_IMPORT:
        return [f"{module} lies in no known area"]
    else:
        allowed = MAY_IMPORT[area] | {area}
    names = imported_modules(ast.parse(source), module, is_package=is_package)
    return [f"{module} imports {name}" for name in names if area_of(name) not in {None, *allowed}]


@pytest.mark.parametrize("path", source_files(), ids=module_of)
def test_a_file_imports_only_from_below(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), module_of(path), is_package=path.stem == "__init__") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("runtime.errors", "import runtime.kernels.loop"),
        ("runtime.kernels.loop", "from runtime.model import expert"),
        ("runtime.model.expert", "def f():\n    from runtime import memory"),
        ("runtime.model.expert", "from ..memory import store"),
        ("runtime.batch", "import runtime.service.server"),
        ("runtime.service.server", "from runtime.batch import run"),
        ("runtime.engine.engine", "from greenroom.pb.greenroom.v1 import greenroom_pb2"),
        ("training.train", "import exporters.onnx"),
        ("training.train", "from runtime import engine"),
        ("exporters.onnx", "from training import data"),
        ("greenroom.client", "from runtime import errors"),
        ("greenroom.client", "import greenroom.cli.main"),
        ("greenroom.pb.x_pb2", "import greenroom.client"),
        ("runtime.service.server", "import greenroom.cli"),
        ("runtime.helpers.x", ""),
    ],
)
def test_the_check_sees_what_is_forbidden(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("runtime.service.server", "import torch\nfrom greenroom.pb.greenroom.v1 import greenroom_pb2"),
        ("runtime.service.server", "from . import status\nfrom ..engine import engine\nfrom .status import code"),
        ("greenroom.cli.main", "from training import data\nimport exporters.onnx\nfrom greenroom import Client"),
        ("training.train", "from runtime.model.base import load_base\nfrom training.data import Example"),
    ],
)
def test_the_check_allows_what_lies_below(module: str, source: str) -> None:
    assert violations(source, module) == []


@pytest.mark.parametrize("module", ["greenroom", "greenroom.client", "greenroom.cli.main"])
def test_importing_the_client_or_the_command_line_imports_no_torch(module: str) -> None:
    heavy = ("torch", "transformers", "peft", "onnx", "onnxruntime", "numpy")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")
