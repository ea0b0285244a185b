"""A short load with faults on the tiny base: what `benchmarks/service.py` measures at length, as a pass or fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_under_cancels_deadlines_disconnects_and_bad_requests_all_are_accounted_for_and_nothing_leaks(
    tiny_base_folder: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "benchmarks/service.py",
        "--base",
        str(tiny_base_folder),
        "--folder",
        str(tmp_path / "r"),
    ]
    command += ["--part", "load", "--streams", "16", "--seconds", "2", "--output", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["leaks"] == {"kv_pages": 0, "expert_references": 0, "tasks": 0, "file_handles": 0}
    assert (found["unaccounted_requests"], found["unexpected"]) == (0, {})
    assert found["requests"] >= 16, "each stream asks at least once"
    assert {kind.split()[0] for kind in found["outcomes"]} >= {"answer", "cancel", "deadline", "disconnect", "bad"}
