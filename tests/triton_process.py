"""A pytest plugin: the real `tritonclient[grpc]` in an environment and a process of its own.

It does not know what is called.
Read first: the environment is made once per user and set of requirements, some ten seconds with a package registry;
`ask` calls and waits, `send` and `receive` leave room to act on the server in between.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from greenroom.cli.places import cache_folder

REQUIREMENTS = ("tritonclient[grpc]==2.73.0", "grpcio==1.85.1", "protobuf==6.33.6", "numpy==2.4.6", "packaging==26.3")
INSTALL_LIMIT_S = 300


class TritonProcess:
    """Calls `tritonclient` in another process; see `triton_calls.py`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def send(self, target: str, call: str, **kwargs: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"target": target, "call": call, "kwargs": kwargs}) + "\n")
        self._process.stdin.flush()

    def receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the client's process ended; its stderr says why"
        return json.loads(line)

    def ask(self, target: str, call: str, **kwargs: Any) -> Any:
        self.send(target, call, **kwargs)
        return self.receive()


def environment(folder: Path) -> Path:
    """The interpreter of an environment with `REQUIREMENTS`, made if it is not there."""
    digest = hashlib.sha256(" ".join((*REQUIREMENTS, sys.version)).encode()).hexdigest()[:12]
    home = folder / f"tritonclient-{digest}"
    home.mkdir(parents=True, exist_ok=True)
    python = home / "bin" / "python"
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "complete").exists():
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True, timeout=60)
            pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
            subprocess.run([*pip, "install", "--quiet", *REQUIREMENTS], check=True, timeout=INSTALL_LIMIT_S)
            (home / "complete").touch()
    return python


@pytest.fixture(scope="session")
def triton() -> Iterator[TritonProcess]:
    """The client's process."""
    python = environment(cache_folder() / "test-environments")
    command = [str(python), "-I", str(Path(__file__).with_name("triton_calls.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield TritonProcess(process)
        finally:
            process.kill()
