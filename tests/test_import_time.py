"""What applications and quick commands import stays light: no torch, no transformers.

It does not measure seconds, which depend on the machine.
Read first: each case imports in a fresh interpreter and looks at what came along.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "onnxruntime", "numpy")


@pytest.mark.parametrize("module", ["greenroom", "greenroom.cli.main", "runtime.service.server"])
def test_importing_is_light(module: str) -> None:
    code = f"import sys, {module}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == []


def test_the_client_imports_nothing_of_the_runtime() -> None:
    code = "import sys, greenroom; print(*[name for name in sys.modules if name.split('.')[0] == 'runtime'])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == []
