"""Exports: how an artefact's folder comes and stays, what cannot be exported, the command and the document.

It does not know what the files compute (`test_export_graphs`, `test_export_adapters`, `test_export_experts`).
Read first: files are made wrong by changing them on disk between writing and verifying.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from exports import files_below, sabotage
from repertoires import Workshop
from typer.testing import CliRunner

from exporters.artefact import read_artefact, replaced_folder, sha256_of
from exporters.options import Options
from exporters.targets import SIMPLE_TARGETS, TARGETS, Exported, export
from exporters.verify import open_session
from greenroom.cli.export import export as export_command
from runtime.errors import (
    DigestMismatchError,
    ExportMismatchError,
    InvalidInputError,
    NotARepertoireError,
)
from runtime.model.repertoire import Repertoire

DOCUMENT = Path(__file__).parent.parent / "docs" / "EXPORT.md"
# ---- the folder


@pytest.mark.parametrize(("target", "constant"), [("onnx-locator", "output_bias"), ("onnx-router", "router_weights")])
def test_a_wrong_file_leaves_nothing(three_tasks: Workshop, target: str, constant: str) -> None:
    root = three_tasks.repertoire.root
    with pytest.raises(ExportMismatchError, match=r"largest error .*, tolerance"):
        export(three_tasks.repertoire, target, on_progress=sabotage(root, constant))
    assert not three_tasks.repertoire.export_folder(3, target).exists()
    assert files_below(root / "exports") == []


def test_a_wrong_file_leaves_an_older_folder_as_it_was(three_tasks: Workshop) -> None:
    done = export(three_tasks.repertoire, "onnx-locator")
    (done.folder / "locator.onnx").write_bytes(b"damaged")
    with pytest.raises(ExportMismatchError):
        export(
            three_tasks.repertoire,
            "onnx-locator",
            on_progress=sabotage(three_tasks.repertoire.root, "output_bias"),
        )
    assert (done.folder / "locator.onnx").read_bytes() == b"damaged"
    assert files_below(three_tasks.repertoire.root / "exports") == ["locator.onnx", "manifest.json"]


def test_the_manifest_says_what_the_files_are_and_what_was_checked(three_tasks: Workshop) -> None:
    manifest = three_tasks.repertoire.manifest()
    locator, router = (export(three_tasks.repertoire, target) for target in ("onnx-locator", "onnx-router"))
    (entry,) = locator.manifest.files
    assert [(spec.name, spec.dtype, spec.shape) for spec in (*entry.inputs, *entry.outputs)] == [
        ("features", "float32", ("B", 64)),
        ("errors", "float32", ("B", 3)),
        ("scores", "float32", ("B", 3)),
        ("task", "int64", ("B",)),
        ("margin", "float32", ("B",)),
    ]
    assert entry.facts == {"tasks": ["red", "green", "blue"], "score": "raw", "feature": "residual_mean", "layer": 2}
    assert [check.output for check in entry.checks] == ["errors", "scores", "task", "margin"]
    blue = router.manifest.files[2]
    assert [file.name for file in router.manifest.files] == ["red.onnx", "green.onnx", "blue.onnx"]
    assert [(spec.name, spec.dtype, spec.shape) for spec in (*blue.inputs, *blue.outputs)] == [
        ("x", "float32", ("T", 64)),
        ("layer", "int64", ()),
        ("weights", "float32", ("T", 3)),
    ]
    columns = [entry.digest for entry in manifest.experts]
    assert blue.facts == {"task": "blue", "columns": columns, "layers": [2, 3], "top_k": 2, "kind": "top_k"}
    for file in (entry, *router.manifest.files):
        assert file.opset == 18
        for check in file.checks:
            assert check.sizes == (1, 2, 7, 64)
            assert check.max_error <= check.tolerance <= 1e-5
            assert check.rows_compared > 0.9 * check.rows
    assert (locator.folder, locator.was_there) == (three_tasks.repertoire.export_folder(3, "onnx-locator"), False)
    for file in router.manifest.files:
        assert sha256_of(router.folder / file.name) == file.sha256
        assert (router.folder / file.name).stat().st_size == file.bytes
    assert read_artefact(router.folder) == router.manifest


def test_a_file_carries_its_facts_in_its_own_metadata(three_tasks: Workshop) -> None:
    done = export(three_tasks.repertoire, "onnx-router")
    for file in done.manifest.files:
        metadata = open_session(done.folder / file.name).get_modelmeta().custom_metadata_map
        assert {key: json.loads(value) for key, value in metadata.items()} == file.facts


def times(done: Exported) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (done.folder, *done.folder.iterdir())}


@pytest.mark.parametrize("target", SIMPLE_TARGETS)
def test_exporting_again_does_nothing(three_tasks: Workshop, target: str) -> None:
    first = export(three_tasks.repertoire, target)
    before = times(first)
    told: list[str] = []
    second = export(three_tasks.repertoire, target, on_progress=told.append)
    assert (second.was_there, second.manifest, times(second), told) == (True, first.manifest, before, [])


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [truncate, Path.unlink, lambda path: path.write_bytes(path.read_bytes() + b" ")])
@pytest.mark.parametrize("name", ["blue.onnx", "manifest.json"])
def test_a_damaged_folder_is_replaced(three_tasks: Workshop, damage: Callable[[Path], Any], name: str) -> None:
    first = export(three_tasks.repertoire, "onnx-router")
    if name == "manifest.json" and damage not in (truncate, Path.unlink):
        damage = lambda path: path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))  # noqa: E731
    damage(first.folder / name)
    (first.folder / "stray").touch()
    second = export(three_tasks.repertoire, "onnx-router")
    assert (second.was_there, second.manifest) == (False, first.manifest)
    assert files_below(three_tasks.repertoire.root / "exports") == [
        "blue.onnx",
        "green.onnx",
        "manifest.json",
        "red.onnx",
    ]


def test_an_artefact_of_another_generation_of_the_same_number_is_replaced(three_tasks: Workshop) -> None:
    first = export(three_tasks.repertoire, "onnx-locator")
    path = three_tasks.repertoire.root / "generations" / "000003.json"
    path.write_text(path.read_text().replace('"threshold": 1e9', '"threshold": 5.0').replace("1000000000.0", "5.0"))
    second = export(three_tasks.repertoire, "onnx-locator")
    assert not second.was_there
    assert second.manifest.files[0].sha256 != first.manifest.files[0].sha256


def test_an_artefact_says_which_manifest_it_was_made_from_as_that_lies_on_disk(three_tasks: Workshop) -> None:
    path = three_tasks.repertoire.root / "generations" / "000003.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields, indent=None))  # as a version with other optional fields may have written it
    first = export(three_tasks.repertoire, "onnx-locator")
    assert first.manifest.source_sha256 == sha256_of(path)
    assert export(three_tasks.repertoire, "onnx-locator").was_there


def test_what_a_crash_left_behind_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "exports" / "000001" / "onnx-locator"
    for leftover in (".partial-onnx-locator", ".replaced-onnx-locator"):
        (folder.parent / leftover).mkdir(parents=True)
        (folder.parent / leftover / "old").touch()
    with replaced_folder(folder) as partial:
        (partial / "new").write_text("new")
    assert files_below(tmp_path) == ["new"]


def test_two_exports_at_once_both_succeed(three_tasks: Workshop) -> None:
    barrier = threading.Barrier(2)
    done: list[Exported] = []

    def work() -> None:
        barrier.wait()
        done.append(export(three_tasks.repertoire, "onnx-locator"))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    left = read_artefact(done[0].folder)
    assert left is not None
    assert [entry.manifest.files[0].sha256 for entry in done] == [left.files[0].sha256] * 2
    assert files_below(three_tasks.repertoire.root / "exports") == ["locator.onnx", "manifest.json"]


def test_an_older_generation_is_exported_by_its_number(three_tasks: Workshop) -> None:
    done = export(three_tasks.repertoire, "onnx-router", generation=1)
    assert [file.name for file in done.manifest.files] == ["red.onnx"]
    assert done.folder == three_tasks.repertoire.export_folder(1, "onnx-router")


# ---- what cannot be exported


def test_an_unknown_target_is_named(three_tasks: Workshop) -> None:
    with pytest.raises(InvalidInputError, match="target='onnx': must be one of onnx-locator, onnx-router, "):
        export(three_tasks.repertoire, "onnx")


def test_an_empty_repertoire_or_an_absent_generation_is_no_repertoire(tmp_path: Path, three_tasks: Workshop) -> None:
    with pytest.raises(NotARepertoireError, match="no HEAD"):
        export(Repertoire(tmp_path / "empty"), "onnx-locator")
    with pytest.raises(NotARepertoireError, match="generation 9"):
        export(three_tasks.repertoire, "onnx-locator", generation=9)
    assert not (tmp_path / "empty").exists()


def test_a_task_that_cannot_be_read_is_named_and_nothing_is_exported(three_tasks: Workshop) -> None:
    digest = three_tasks.repertoire.manifest().task("green").router.digest
    blob = three_tasks.repertoire.root / "blobs" / "sha256" / digest[:2] / digest
    truncate(blob)
    for target in SIMPLE_TARGETS:
        with pytest.raises(DigestMismatchError, match="task green: blob"):
            export(three_tasks.repertoire, target)
    assert not (three_tasks.repertoire.root / "exports").exists()


# ---- the command and the document


def command(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(export_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_exports_all_targets_without_options_and_says_so(three_tasks: Workshop) -> None:
    root = three_tasks.repertoire.root
    first = command("--repertoire", root)
    assert first.exit_code == 0, first.output
    rows = {line.split()[0]: line.split() for line in first.stdout.splitlines() if line.split()[0] in TARGETS}
    assert tuple(rows) == SIMPLE_TARGETS
    size = (root / "exports/000003/onnx-locator/locator.onnx").stat().st_size
    assert rows["onnx-locator"][1:3] == ["1", f"{size:,}"]
    again = command("onnx-router", "onnx-router", "--repertoire", root, "--generation", 3)
    assert again.stdout.count("already there") == 1


def test_the_command_rejects_an_unknown_target_before_it_exports_any(three_tasks: Workshop) -> None:
    result = command("onnx-locator", "onxx", "--repertoire", three_tasks.repertoire.root)
    assert isinstance(result.exception, InvalidInputError)
    assert result.exception.field == "target"
    assert not (three_tasks.repertoire.root / "exports").exists()


def test_the_command_gives_each_target_the_options_that_it_takes(three_tasks: Workshop, tiny_base_folder: Path) -> None:
    root = three_tasks.repertoire.root
    done = command(
        *("onnx-locator", "gguf-lora", "merged", "--repertoire", root),
        *("--base", tiny_base_folder, "--task", "blue", "--weights", "only-own"),
    )
    assert done.exit_code == 0, done.output
    folders = [line.split()[-1] for line in done.stdout.splitlines()[1:4]]
    assert [folder.partition(".")[0] for folder in folders] == ["onnx-locator", "gguf-lora", "merged"]
    assert all((root / "exports" / "000003" / folder / "manifest.json").is_file() for folder in folders)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["onnx-locator", "--task", "red"], "task"),
        (["onnx-locator", "gguf-lora", "--task", "red", "--arch", "sm_90"], "arch"),
        (["onnx-locator", "peft", "--task", "red"], "base"),
    ],
)
def test_the_command_refuses_an_option_that_no_target_takes_and_one_that_is_missing(
    three_tasks: Workshop, arguments: list[str], field: str
) -> None:
    result = command(*arguments, "--repertoire", three_tasks.repertoire.root)
    assert isinstance(result.exception, InvalidInputError)
    assert result.exception.field == field
    assert not (three_tasks.repertoire.root / "exports").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_snippets_of_the_document_run(
    three_tasks: Workshop, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for target in SIMPLE_TARGETS:
        export(three_tasks.repertoire, target)
    mixture = Options(base=tiny_base_folder, weights="red=0.7,blue=0.3")
    for target in ("peft", "merged"):
        export(three_tasks.repertoire, target, options=mixture)
    export(three_tasks.repertoire, "gguf-lora", options=mixture.only(["weights"]))
    export(three_tasks.repertoire, "onnx-features", options=mixture.only(["base"]))
    place = three_tasks.repertoire.root.parent
    (place / "base").symlink_to(tiny_base_folder)
    monkeypatch.chdir(place)

    outputs = {}
    for heading, text in re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE):
        for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(compile(snippet, "EXPORT.md", "exec"), {})
            outputs[heading.strip("`")] = capsys.readouterr().out.splitlines()
    assert [line.split(" margin")[0] for line in outputs["onnx-locator"]] == [
        "12 34 56 78 90 -> green",
        "aaaa bbbb cccc -> red",
    ]
    assert len(outputs["onnx-router"]) == 5
    assert outputs["onnx-experts"] == ["(5, 128) (5, 128)"]
    assert [line.split()[0] for line in outputs["Locating without torch"]] == ["green", "red"]
    assert outputs["peft"] == ["PeftModelForCausalLM 12"]
    assert len(outputs["merged"]) > 0
    assert outputs["gguf-lora"] == ["llama 12.0", "12 blk.2.ffn_gate.weight.lora_a"]


def test_the_document_names_every_target() -> None:
    assert [target for target in TARGETS if f"## `{target}`" not in DOCUMENT.read_text()] == []
