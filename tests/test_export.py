"""Exports: what the files compute, that they are verified, and how the folder comes and stays.

Read first: `generation` has random densities and an expert set that lacks a layer, so that every constant of a graph
matters; files are made wrong by changing them on disk between writing and verifying, through the progress callback.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
import typer
from repertoires import Workshop
from typer.testing import CliRunner

from exporters.artefact import read_artefact, replaced_folder, sha256_of
from exporters.onnx_locator import locator_cases, write_locator
from exporters.onnx_router import router_cases, router_columns, write_routers
from exporters.targets import TARGETS, Exported, export
from exporters.verify import SIZES, Case, Wanted, open_session, verify
from greenroom.cli.export import export as export_command
from runtime.errors import (
    DigestMismatchError,
    ExportMismatchError,
    InvalidInputError,
    NotARepertoireError,
)
from runtime.kernels.routing import top_k_weights
from runtime.model.generation import Generation, Router, open_generation
from runtime.model.locator import Locator, pool, vae_shapes
from runtime.model.manifest import LocatorEntry
from runtime.model.repertoire import Repertoire

DOCUMENT = Path(__file__).parent.parent / "docs" / "EXPORT.md"
WIDTH = 64


def quiet(_text: str) -> None:
    """Progress that nobody watches."""


def random_locator(num_tasks: int, score: str) -> Locator:
    """A locator with random weights everywhere, whose thresholds some of its own features exceed."""
    generator = torch.Generator().manual_seed(num_tasks)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    frame = {"mean": random(WIDTH), "deviation": random(WIDTH).abs() + 0.5, "projection": random(WIDTH, 256) / 8}
    entries = []
    for task in range(num_tasks):
        vae = {name: random(*shape) / shape[-1] ** 0.5 for name, shape in vae_shapes().items()}
        entries.append((f"task-{task}", vae, LocatorEntry(digest="0" * 64, mean=0.8 + task, sd=0.3, threshold=1.0)))
    locator = Locator(frame, entries, score=score)
    locator.thresholds = locator.errors(noise(locator, 101)).median(0).values
    return locator


def noise(locator: Locator, size: int) -> torch.Tensor:
    features = torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(size))
    return locator.frame["mean"] + locator.frame["deviation"] * features


def with_locator(generation: Generation, locator: Locator) -> Generation:
    reference = generation.manifest.locator.model_copy(update={"score": locator.score})
    manifest = generation.manifest.model_copy(update={"locator": reference})
    return dataclasses.replace(generation, manifest=manifest, locator=locator)


@pytest.fixture
def generation(three_tasks: Workshop) -> Generation:
    """Generation 3 with random densities; the first expert set has no expert in layer 3."""
    opened = with_locator(open_generation(three_tasks.repertoire), random_locator(3, "z"))
    first, *others = opened.manifest.experts
    manifest = opened.manifest.model_copy(
        update={"experts": (first.model_copy(update={"units": first.units[:1]}), *others)}
    )
    mixtures = {}
    for name, mixture in opened.mixtures.items():
        routers = dict(mixture.routers)
        kept = Router(routers[3].weight[1:], routers[3].experts[1:])
        routers[3] = kept
        if not kept.experts:
            del routers[3]
        mixtures[name] = dataclasses.replace(mixture, routers=routers)
    return dataclasses.replace(opened, manifest=manifest, mixtures=mixtures)


def run(path: Path, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    session = open_session(path)
    values = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return {output.name: torch.from_numpy(value) for output, value in zip(session.get_outputs(), values, strict=True)}


# ---- onnx-locator


@pytest.mark.parametrize("score", ["raw", "z", "abs_z"])
@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_the_locator_graph_says_what_the_locator_says_on_any_number_of_prompts(
    generation: Generation, tmp_path: Path, num_tasks: int, score: str
) -> None:
    locator = random_locator(num_tasks, score)
    write_locator(with_locator(generation, locator), tmp_path, quiet)
    chosen = set()
    for size in (1, 3, 33):
        features = noise(locator, size)
        got = run(tmp_path / "locator.onnx", features=features)
        errors = locator.errors(features)
        torch.testing.assert_close(got["errors"], errors, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got["scores"], locator.scores(errors), rtol=1e-5, atol=1e-4)
        decisions = locator.locate(features)
        names = [locator.tasks[index] if index >= 0 else None for index in got["task"].tolist()]
        assert names == [decision.task for decision in decisions]
        margins = torch.tensor([decision.margin for decision in decisions])
        torch.testing.assert_close(got["margin"], margins, rtol=1e-5, atol=1e-4)
        chosen |= set(names)
    assert len(chosen) > 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_feature_that_is_not_finite_is_of_no_task(generation: Generation, tmp_path: Path, value: float) -> None:
    write_locator(generation, tmp_path, quiet)
    features = torch.zeros(2, WIDTH)
    features[0, 5] = value
    assert generation.locator.locate(features)[0].task is None
    assert run(tmp_path / "locator.onnx", features=features)["task"][0] == -1


def test_the_verifying_features_reach_every_task_and_none() -> None:
    points, entries = torch.eye(3, 256) * 16, []
    for task, point in enumerate(points):
        vae = {name: torch.zeros(shape) for name, shape in vae_shapes().items()}
        calibration = LocatorEntry(digest="0" * 64, mean=0.0, sd=1.0, threshold=0.1)
        entries.append((f"task-{task}", {**vae, "output.bias": point}, calibration))
    frame = {"mean": torch.ones(WIDTH), "deviation": torch.ones(WIDTH) * 2, "projection": torch.eye(WIDTH, 256)}
    locator = Locator(frame, entries, score="raw")
    tasks = [index for case in locator_cases(locator) for index in case.outputs["task"].value.tolist()]
    assert set(tasks) == {-1, 0, 1, 2}


def test_a_generation_without_tasks_has_no_locator_to_export(generation: Generation, tmp_path: Path) -> None:
    empty = with_locator(generation, Locator(generation.locator.frame, [], score="raw"))
    with pytest.raises(InvalidInputError, match="generation=3: it holds no task"):
        write_locator(empty, tmp_path, quiet)


def test_real_prompts_are_located_by_the_exported_file(three_tasks: Workshop, prototypes: dict[str, str]) -> None:
    done = export(three_tasks.repertoire, "onnx-locator")
    features = torch.stack([pool(three_tasks.residual(text)) for text in prototypes.values()])
    got = run(done.folder / "locator.onnx", features=features)
    assert [done.manifest.files[0].facts["tasks"][index] for index in got["task"]] == list(prototypes)


# ---- onnx-router


@pytest.mark.parametrize("num_tokens", [1, 3, 65])
def test_a_router_graph_gives_the_weights_of_top_k_in_the_columns_of_the_visible_set(
    generation: Generation, tmp_path: Path, num_tokens: int
) -> None:
    write_routers(generation, tmp_path, quiet)
    x = torch.randn(num_tokens, WIDTH, generator=torch.Generator().manual_seed(num_tokens))
    for task, mixture in generation.mixtures.items():
        visible = generation.manifest.task(task).router.visible
        for layer, router in mixture.routers.items():
            logits = x @ router.weight.t()
            k = torch.full((num_tokens,), mixture.top_k)
            expected = top_k_weights(logits, torch.ones_like(logits, dtype=torch.bool), k, mixture.top_k)
            got = run(tmp_path / f"{task}.onnx", x=x, layer=torch.tensor(layer))["weights"]
            here = [visible.index(digest) for digest in router.experts]
            absent = [column for column in range(len(visible)) if column not in here]
            torch.testing.assert_close(got[:, here], expected, rtol=1e-5, atol=1e-5)
            assert (got[:, here] > 0).eq(expected > 0).all()
            assert (got[:, absent] == 0).all()


@pytest.mark.parametrize("layer", [0, 1, 4, 99, -1, -2])
def test_a_layer_without_a_router_gives_zeros(generation: Generation, tmp_path: Path, layer: int) -> None:
    write_routers(generation, tmp_path, quiet)
    weights = run(tmp_path / "blue.onnx", x=torch.randn(3, WIDTH), layer=torch.tensor(layer))["weights"]
    assert torch.equal(weights, torch.zeros(3, 3))


def test_a_layer_that_one_task_lacks_gives_zeros_for_that_task_alone(generation: Generation, tmp_path: Path) -> None:
    write_routers(generation, tmp_path, quiet)
    x, layer = torch.randn(3, WIDTH), torch.tensor(3)
    assert torch.equal(run(tmp_path / "red.onnx", x=x, layer=layer)["weights"], torch.zeros(3, 1))
    assert torch.equal(run(tmp_path / "green.onnx", x=x, layer=layer)["weights"][:, 1], torch.ones(3))


def test_routers_that_cannot_tell_their_experts_apart_are_not_called_verified(
    generation: Generation, tmp_path: Path
) -> None:
    blue = generation.mixtures["blue"]
    routers = {2: Router(torch.ones(3, WIDTH), blue.routers[2].experts), 3: blue.routers[3]}
    mixtures = {"blue": dataclasses.replace(blue, routers=routers)}
    with pytest.raises(ExportMismatchError, match=r"blue\.onnx: output weights: no row could be compared"):
        write_routers(dataclasses.replace(generation, mixtures=mixtures), tmp_path, quiet)


# ---- verification


def change_constant(path: Path, name: str) -> None:
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    value = onnx.numpy_helper.to_array(tensor)
    changed = ~value if value.dtype == np.bool_ else (value * 1.1 + 1).astype(value.dtype)
    tensor.CopyFrom(onnx.numpy_helper.from_array(changed, name))
    onnx.save(model, path)


@pytest.mark.parametrize(
    "constant",
    [
        *("frame_mean", "frame_deviation", "frame_projection", "error_mean", "error_sd", "threshold"),
        *(f"{linear}_{part}" for linear in ("encode", "mu", "decode", "output") for part in ("weight", "bias")),
    ],
)
def test_any_changed_constant_of_the_locator_fails_verification(
    generation: Generation, tmp_path: Path, constant: str
) -> None:
    write_locator(generation, tmp_path, quiet)
    path = tmp_path / "locator.onnx"
    verify(path, locator_cases(generation.locator))
    change_constant(path, constant)
    with pytest.raises(ExportMismatchError, match=r"locator\.onnx: output \w+ differs .* error .*, tolerance "):
        verify(path, locator_cases(generation.locator))


@pytest.mark.parametrize("constant", ["layers", "slots", "router_weights", "has_experts"])
def test_any_changed_constant_of_a_router_fails_verification(
    generation: Generation, tmp_path: Path, constant: str
) -> None:
    write_routers(generation, tmp_path, quiet)
    path, columns = tmp_path / "blue.onnx", router_columns(generation.manifest, "blue")
    verify(path, router_cases(generation.mixtures["blue"], columns, 3))
    change_constant(path, constant)
    with pytest.raises(ExportMismatchError, match=r"blue\.onnx: "):
        verify(path, router_cases(generation.mixtures["blue"], columns, 3))


def test_another_shape_dtype_or_set_of_outputs_fails_verification(generation: Generation, tmp_path: Path) -> None:
    write_locator(generation, tmp_path, quiet)
    path = tmp_path / "locator.onnx"
    (largest,) = (case for case in locator_cases(generation.locator) if case.size == SIZES[-1])
    outputs = dict(largest.outputs)

    def check(case: Case, message: str) -> None:
        with pytest.raises(ExportMismatchError, match=message):
            verify(path, [case])

    shorter = {**outputs, "margin": Wanted(outputs["margin"].value[:-1])}
    check(dataclasses.replace(largest, outputs=shorter), r"margin is float32 \(64,\), torch has float32 \(63,\)")
    other = {**outputs, "task": Wanted(outputs["task"].value.int())}
    check(dataclasses.replace(largest, outputs=other), "task is int64 .*, torch has int32")
    check(dataclasses.replace(largest, outputs={"errors": outputs["errors"]}), "outputs are")
    wide = {"features": torch.zeros(SIZES[-1], WIDTH + 1)}
    check(dataclasses.replace(largest, inputs=wide), "onnxruntime fails on 64 rows")
    nan = {**outputs, "margin": Wanted(torch.full((SIZES[-1],), torch.nan))}
    check(dataclasses.replace(largest, outputs=nan), "largest error nan")


def test_a_file_that_is_no_model_fails_verification(tmp_path: Path) -> None:
    (tmp_path / "locator.onnx").write_bytes(b"no model")
    with pytest.raises(ExportMismatchError, match=r"locator\.onnx: onnxruntime does not take it"):
        verify(tmp_path / "locator.onnx", [])


# ---- the folder


def sabotage(root: Path, target: str, constant: str) -> Callable[[str], None]:
    """A progress callback that changes a constant of every file once it is written and before it is verified."""

    def on_progress(text: str) -> None:
        if "verifying" in text:
            change_constant(next(root.rglob(f".partial-{target}")) / text.partition(":")[0], constant)

    return on_progress


def files_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != ".writer-lock")


@pytest.mark.parametrize(("target", "constant"), [("onnx-locator", "output_bias"), ("onnx-router", "router_weights")])
def test_a_wrong_file_leaves_nothing(three_tasks: Workshop, target: str, constant: str) -> None:
    root = three_tasks.repertoire.root
    with pytest.raises(ExportMismatchError, match=r"largest error .*, tolerance"):
        export(three_tasks.repertoire, target, on_progress=sabotage(root, target, constant))
    assert not three_tasks.repertoire.export_folder(3, target).exists()
    assert files_below(root / "exports") == []


def test_a_wrong_file_leaves_an_older_folder_as_it_was(three_tasks: Workshop) -> None:
    done = export(three_tasks.repertoire, "onnx-locator")
    (done.folder / "locator.onnx").write_bytes(b"damaged")
    with pytest.raises(ExportMismatchError):
        export(
            three_tasks.repertoire,
            "onnx-locator",
            on_progress=sabotage(three_tasks.repertoire.root, "onnx-locator", "output_bias"),
        )
    assert (done.folder / "locator.onnx").read_bytes() == b"damaged"
    assert files_below(three_tasks.repertoire.root / "exports") == ["locator.onnx", "manifest.json"]


def test_the_manifest_says_what_the_files_are_and_what_was_checked(three_tasks: Workshop) -> None:
    manifest = three_tasks.repertoire.manifest()
    locator, router = (export(three_tasks.repertoire, target) for target in TARGETS)
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
    assert blue.facts == {"task": "blue", "columns": columns, "layers": [2, 3], "top_k": 2}
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


def test_the_order_in_which_constants_come_does_not_change_a_file(generation: Generation, tmp_path: Path) -> None:
    (first,) = write_locator(generation, tmp_path, quiet)
    turned = generation.locator
    turned.frame = dict(reversed(turned.frame.items()))
    (second,) = write_locator(generation, tmp_path, quiet)
    assert second.sha256 == first.sha256


def times(done: Exported) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (done.folder, *done.folder.iterdir())}


@pytest.mark.parametrize("target", TARGETS)
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
    with pytest.raises(InvalidInputError, match="target='onnx': must be one of onnx-locator, onnx-router"):
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
    for target in TARGETS:
        with pytest.raises(DigestMismatchError, match="task green: blob"):
            export(three_tasks.repertoire, target)
    assert not (three_tasks.repertoire.root / "exports").exists()


# ---- the command and the document


def command(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(export_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_exports_all_targets_and_says_so(three_tasks: Workshop) -> None:
    root = three_tasks.repertoire.root
    first = command("--repertoire", root)
    assert first.exit_code == 0, first.output
    rows = {line.split()[0]: line.split() for line in first.stdout.splitlines() if line.split()[0] in TARGETS}
    assert list(rows) == list(TARGETS)
    size = (root / "exports/000003/onnx-locator/locator.onnx").stat().st_size
    assert rows["onnx-locator"][1:3] == ["1", f"{size:,}"]
    again = command("onnx-router", "onnx-router", "--repertoire", root, "--generation", 3)
    assert again.stdout.count("already there") == 1


def test_the_command_rejects_an_unknown_target_before_it_exports_any(three_tasks: Workshop) -> None:
    result = command("onnx-locator", "onxx", "--repertoire", three_tasks.repertoire.root)
    assert isinstance(result.exception, InvalidInputError)
    assert result.exception.field == "target"
    assert not (three_tasks.repertoire.root / "exports").exists()


def test_the_snippets_of_the_document_run(
    three_tasks: Workshop, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for target in TARGETS:
        export(three_tasks.repertoire, target)
    place = three_tasks.repertoire.root.parent
    (place / "base").symlink_to(tiny_base_folder)
    monkeypatch.chdir(place)
    locate, route = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    exec(compile(locate, "EXPORT.md", "exec"), {})
    assert [line.split(" margin")[0] for line in capsys.readouterr().out.splitlines()] == [
        "12 34 56 78 90 -> green",
        "aaaa bbbb cccc -> red",
    ]
    exec(compile(route, "EXPORT.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_the_document_names_every_target() -> None:
    assert all(f"## `{target}`" in DOCUMENT.read_text() for target in TARGETS)
