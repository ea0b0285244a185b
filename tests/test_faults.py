"""Faults that happen to a served repertoire: each its own clear status, and the server lives on or comes back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from repertoires import Workshop
from serving import Serving

import greenroom
from greenroom import Client
from runtime.engine.engine import Engine

ROOT = Path(__file__).parents[1]


def blob_of(workshop: Workshop, task: str) -> Path:
    digest = workshop.repertoire.manifest().task(task).experts
    assert digest is not None
    return workshop.repertoire.root / "blobs" / "sha256" / digest[:2] / digest


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(truncate, "BLOB_TRUNCATED"), (flip_a_bit, "DIGEST_MISMATCH"), (Path.unlink, "BLOB_MISSING")],
)
def test_a_damaged_expert_fails_its_own_requests_and_no_others(
    three_tasks: Workshop,
    make_engine: Callable[..., Engine],
    prototypes: dict[str, str],
    damage: Callable[[Path], None],
    reason: str,
) -> None:
    damage(blob_of(three_tasks, "blue"))
    with Serving(make_engine(three_tasks, start=False)) as serving, Client(serving.target) as client:
        for task in ("blue", None):
            with pytest.raises(greenroom.FailedPreconditionError) as caught:
                client.generate(prototypes["blue"], task=task, max_tokens=2)
            assert caught.value.reason == reason
        assert client.generate(prototypes["green"], max_tokens=2).routing.task == "green"
        assert client.describe().memory.failures > 0


def test_an_expert_memory_too_small_for_a_visible_set_is_its_own_status(
    three_tasks: Workshop, make_engine: Callable[..., Engine]
) -> None:
    engine = make_engine(three_tasks, start=False, expert_budget_bytes=5000)
    with Serving(engine) as serving, Client(serving.target) as client:
        with pytest.raises(greenroom.ExhaustedError) as caught:
            client.generate("x", task="blue", max_tokens=2)
        assert caught.value.reason == "BUDGET_TOO_SMALL"
        assert client.generate("x", base_only=True, max_tokens=2).text is not None


@contextmanager
def served(workshop: Workshop, base: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`greenroom serve` in a process of its own."""
    command = [sys.executable, "-m", "greenroom.cli.main", "serve", "--port", "0", "--threads", "1"]
    command += ["--repertoire", str(workshop.repertoire.root), "--base", str(base)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().split()[-1]
        finally:
            process.kill()


def test_a_server_killed_in_mid_stream_is_unavailable_and_a_new_one_serves_at_once(
    three_tasks: Workshop, tiny_base_folder: Path
) -> None:
    with served(three_tasks, tiny_base_folder) as (process, target), Client(target) as client:
        stream = client.stream("x", task="red", max_tokens=400, ignore_eos=True)
        next(stream)
        process.kill()
        with pytest.raises(greenroom.UnavailableError):
            list(stream)
    with served(three_tasks, tiny_base_folder) as (_, target), Client(target) as client:
        assert client.generate("x", task="red", max_tokens=2).routing.task == "red"


def test_a_repertoire_of_another_base_is_not_served(
    three_tasks: Workshop, tiny_base_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_base_folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    command = [sys.executable, "-m", "greenroom.cli.main", "serve", "--repertoire", str(three_tasks.repertoire.root)]
    result = subprocess.run([*command, "--base", str(other)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "digest is" in result.stderr
    assert "Traceback" not in result.stderr
