"""`greenroom repertoire` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from repertoires import Workshop
from typer.testing import CliRunner, Result

from greenroom.cli.main import app
from runtime.model.repertoire import Repertoire


def invoke(workshop: Workshop, *words: object) -> Result:
    command, *rest = (str(word) for word in words)
    return CliRunner().invoke(app, ["repertoire", command, "--repertoire", str(workshop.repertoire.root), *rest])


def output(workshop: Workshop, *words: object) -> str:
    result = invoke(workshop, *words)
    assert result.exit_code == 0, result.output
    return result.stdout


def as_json(workshop: Workshop, *words: object) -> Any:
    return json.loads(output(workshop, *words, "--json"))


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    key, pem = Ed25519PrivateKey.generate(), serialization.Encoding.PEM
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_list_shows_every_generation_and_marks_the_current_one(three_tasks: Workshop) -> None:
    lines = output(three_tasks, "list").splitlines()
    assert [line.split()[:3] for line in lines if line[:1].isdigit()] == [
        ["1", "-", "1"],
        ["2", "1", "2"],
        ["3", "*", "2"],
    ]
    rows = as_json(three_tasks, "list")["generations"]
    assert [(row["generation"], row["num_tasks"], row["is_current"]) for row in rows] == [
        (1, 1, False),
        (2, 2, False),
        (3, 3, True),
    ]


def test_list_says_what_is_wrong_with_a_generation(three_tasks: Workshop) -> None:
    three_tasks.repertoire.manifest_path(2).write_text("[markup]")
    assert "cannot be read: 000002.json: not a JSON object" in output(three_tasks, "list")


def test_show_names_tasks_with_layers_and_ranks(three_tasks: Workshop) -> None:
    text = output(three_tasks, "show")
    assert "3 (current)" in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line}
    digest = three_tasks.repertoire.manifest().experts[2].digest
    assert rows["blue"][1:5] == [digest[:12], "2-3", "8", "float32"]
    shown = as_json(three_tasks, "show", "--generation", 1)
    assert [task["task"] for task in shown["tasks"]] == ["red"]
    assert (shown["generation"]["parent"], shown["base"]["num_layers"]) == (None, 4)


def test_diff_shows_what_came_and_what_is_shared(three_tasks: Workshop) -> None:
    text = output(three_tasks, "diff", 2, 3)
    assert [line.split() for line in text.splitlines() if line.startswith("tasks")] == [["tasks", "blue", "-", "-"]]
    difference = as_json(three_tasks, "diff", 2, 3)
    assert difference["tasks"] == {"added": ["blue"], "removed": [], "changed": []}
    assert difference["only_second"]["num_blobs"] >= 3


def test_verify_is_silent_about_what_is_whole_and_fails_with_all_that_is_not(three_tasks: Workshop) -> None:
    assert "no faults" in output(three_tasks, "verify", "--all")
    manifest = three_tasks.repertoire.manifest()
    for entry in manifest.experts[1:]:
        three_tasks.repertoire.blob_path(entry.digest).unlink()
    result = invoke(three_tasks, "verify")
    assert result.exit_code == 1
    assert result.stdout.count("BLOB_MISSING") == 2
    assert "2 faults" in result.stdout
    found = json.loads(invoke(three_tasks, "verify", "--json").stdout)
    assert [fault["error"]["reason"] for fault in found["faults"]] == ["BLOB_MISSING"] * 2
    assert invoke(three_tasks, "verify", "--generation", 1).exit_code == 0


def test_gc_says_what_would_go_before_it_goes(three_tasks: Workshop) -> None:
    assert "generations would go    1, 2" in output(three_tasks, "gc", "--keep", 1, "--dry-run")
    assert three_tasks.repertoire.generations() == (1, 2, 3)
    assert as_json(three_tasks, "gc", "--keep", 1)["removed"] == [1, 2]
    assert three_tasks.repertoire.generations() == (3,)


def test_push_and_pull_say_what_moved(three_tasks: Workshop, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    assert "is at generation 3" in output(three_tasks, "push", target)
    assert "generations -; 0 blobs, 0 bytes" in output(three_tasks, "push", f"file://{target}")
    copy = Workshop(three_tasks.base, Repertoire(tmp_path / "other"))
    assert "moved: generations 1, 2, 3; " in output(copy, "pull", target)
    copy.repertoire.rollback(expected=3, to=1)
    three_tasks.repertoire.rollback(expected=3, to=2)
    result = invoke(copy, "push", three_tasks.repertoire.root)
    assert result.exit_code == 1
    assert "another history" in result.stderr


def test_rollback_publishes_and_fails_on_another_generation_than_expected(three_tasks: Workshop) -> None:
    assert "generation 4 is current; it holds what generation 1 holds" in output(three_tasks, "rollback", "--to", 1)
    assert three_tasks.repertoire.manifest().task_names() == ("red",)
    result = invoke(three_tasks, "rollback", "--to", 1, "--expected", 3)
    assert (result.exit_code, three_tasks.repertoire.head()) == (1, 4)
    assert "current is 4" in result.stderr


def test_signing_makes_a_strict_verification_pass(three_tasks: Workshop, keys: tuple[Path, Path]) -> None:
    private, public = keys
    assert "SIGNATURE_INVALID" in invoke(three_tasks, "verify", "--trust", public).stdout
    assert "generation 3 is signed by" in output(three_tasks, "sign", "--key", private)
    assert "no faults" in output(three_tasks, "verify", "--trust", public)
    output(three_tasks, "rollback", "--to", 2, "--key", private)
    assert "no faults" in output(three_tasks, "verify", "--trust", public)
    copy = Workshop(three_tasks.base, Repertoire(three_tasks.repertoire.root.with_name("copy")))
    result = invoke(copy, "pull", three_tasks.repertoire.root, "--trust", public)
    assert "000001.json: not signed" in result.stderr


@pytest.mark.parametrize("words", [["list"], ["show"], ["verify"], ["gc"], ["diff", 1, 2], ["rollback", "--to", 1]])
def test_where_nothing_was_published_there_is_one_line_and_nothing_is_made(
    workshop: Workshop, words: list[object]
) -> None:
    result = invoke(workshop, *words)
    assert result.exit_code == 1
    assert result.stderr.startswith("greenroom: ")
    assert len(result.stderr.splitlines()) == 1
    assert not workshop.repertoire.root.exists()


def test_a_key_that_is_not_there_is_a_wrong_input(three_tasks: Workshop, tmp_path: Path) -> None:
    assert invoke(three_tasks, "sign", "--key", tmp_path / "none").exit_code == 2
    assert invoke(three_tasks, "push", "nonsense://x").exit_code == 2
