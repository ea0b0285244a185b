"""Locating without torch: the exported features and locator decide as the engine's own locator does.

Read first: `exported` holds the three tasks' generation with both exports; `real` does the same on the real base once.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import files_below
from repertoires import Workshop
from typer.testing import CliRunner

from exporters.block_codes import BLOCK, decode, encode
from exporters.onnx_features import _agreement
from exporters.onnx_llama import check_llama
from exporters.options import Options
from exporters.targets import export
from greenroom.cli.main import app
from greenroom.locate import LocatorFilesError, PromptError, PromptLocator, exports_folder
from runtime.errors import ExportMismatchError, InvalidInputError
from runtime.model.base import BaseModel, load_base
from runtime.model.generation import open_generation
from runtime.model.locator import pool
from runtime.model.repertoire import Repertoire
from training.config import TrainingConfig
from training.data import Example, TaskData
from training.features import features
from training.grow import add_task

CPU = torch.device("cpu")
PROMPTS = ["aaaa bbbb cccc", "12 34 56", "?", "", "<|im_end|> the <|im_start|>", "the theatre, the actors\n", "é中😀"]


def export_both(workshop: Workshop, base: Path, **options: Path) -> Path:
    done = export(workshop.repertoire, "onnx-features", options=Options(base=base, **options))
    export(workshop.repertoire, "onnx-locator")
    return done.folder.parent


@pytest.fixture
def exported(three_tasks: Workshop, tiny_base_folder: Path) -> Path:
    return export_both(three_tasks, tiny_base_folder)


def by_torch(workshop: Workshop, prompts: list[str]) -> list[str | None]:
    generation = open_generation(workshop.repertoire)
    features = torch.stack([pool(workshop.residual(prompt)) for prompt in prompts])
    return [decision.task for decision in generation.locator.locate(features)]


def test_prompts_are_located_as_torch_locates_them(
    three_tasks: Workshop, exported: Path, prototypes: dict[str, str]
) -> None:
    prompts = [*prototypes.values(), *PROMPTS]
    locations = PromptLocator(exported).locate(prompts)
    assert [location.task for location in locations] == by_torch(three_tasks, prompts)
    assert [location.task for location in locations[:3]] == list(prototypes)
    for location in locations:
        assert location.scores[0][0] == location.task
        assert [score for _, score in location.scores] == sorted(score for _, score in location.scores)
        assert location.margin == pytest.approx(location.scores[1][1] - location.scores[0][1], rel=1e-4)


def test_a_prompt_is_read_as_the_server_reads_it(three_tasks: Workshop, exported: Path) -> None:
    generation = open_generation(three_tasks.repertoire)
    locations = PromptLocator(exported).locate(PROMPTS)
    for prompt, location in zip(PROMPTS, locations, strict=True):
        assert location.num_tokens == len(generation.template.encode(three_tasks.base.tokenizer, prompt))


def test_a_prompt_gets_the_same_whatever_is_located_beside_it(exported: Path) -> None:
    locator = PromptLocator(exported)
    together = locator.locate(PROMPTS)
    for prompt, location in zip(PROMPTS, together, strict=True):
        (alone,) = locator.locate([prompt])
        assert alone.task == location.task
        assert alone.margin == pytest.approx(location.margin, rel=1e-5)
    assert locator.locate([]) == ()


def test_a_prompt_far_from_every_task_is_of_none(workshop: Workshop, tiny_base_folder: Path) -> None:
    workshop.publish("red", "aaaa bbbb cccc", threshold=1e-3)
    locations = PromptLocator(export_both(workshop, tiny_base_folder)).locate(["aaaa bbbb cccc", "? ! ? !"])
    assert [location.task for location in locations] == ["red", None]


@pytest.mark.parametrize("layer", [0, 1])
def test_features_can_be_read_at_any_layer(
    tmp_path: Path, tiny_base: BaseModel, tiny_base_folder: Path, layer: int, prototypes: dict[str, str]
) -> None:
    workshop = Workshop(tiny_base, Repertoire(tmp_path / "repertoire"), first_layer=layer)
    for name, prototype in prototypes.items():
        workshop.publish(name, prototype)
    locations = PromptLocator(export_both(workshop, tiny_base_folder)).locate(list(prototypes.values()))
    assert [location.task for location in locations] == list(prototypes)


def test_features_in_parts_are_read_as_torch_reads_them(
    tmp_path: Path, tiny_base: BaseModel, tiny_base_folder: Path
) -> None:
    repertoire = Repertoire(tmp_path / "repertoire")
    config = TrainingConfig(first_layer=2, max_steps=1, rank=2, locator_false_abstain=0.0)
    words = {"animals": "cow goat hen owl fox", "digits": "12 305 77 4096 8"}
    for name, some in words.items():
        rows = tuple(Example(" ".join(random.Random(i).choices(some.split(), k=3 + i % 3)), "x") for i in range(40))
        add_task(repertoire, tiny_base, TaskData(name, rows, rows[:2]), config)
    generation = open_generation(repertoire)
    assert generation.manifest.locator.feature == "residual_parts"
    prompts = ["", "a", *words.values(), "12 77 305", "owl fox"]
    locations = PromptLocator(export_both(Workshop(tiny_base, repertoire), tiny_base_folder)).locate(prompts)
    ids = [generation.template.encode(tiny_base.tokenizer, prompt) for prompt in prompts]
    wanted = generation.locator.locate(features(tiny_base, ids, 2, kind="residual_parts"))
    assert [location.task for location in locations] == [decision.task for decision in wanted]
    assert {location.task for location in locations} >= set(words)
    for location, decision in zip(locations, wanted, strict=True):
        assert dict(location.scores) == pytest.approx(dict(decision.scores), rel=0.1, abs=0.05)


def test_prompts_that_cannot_be_located_are_refused(exported: Path) -> None:
    locator = PromptLocator(exported)
    with pytest.raises(PromptError, match="not valid Unicode at character 1"):
        locator.locate(["fine", "a\udcff"])
    with pytest.raises(PromptError, match=r"has \d+ tokens, the base reads 1 to 512"):
        locator.locate(["? " * 600])


# ---- the files


def test_the_manifest_says_how_near_the_features_are_and_how_many_prompts_agree(
    three_tasks: Workshop, tiny_base_folder: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"input": prompt}) + "\n" for prompt in PROMPTS))
    manifest = json.loads(
        (export_both(three_tasks, tiny_base_folder, prompts=rows) / "onnx-features/manifest.json").read_text()
    )
    graph = manifest["files"][0]
    assert (graph["facts"]["prompts"], graph["facts"]["located_alike"]) == (len(PROMPTS), len(PROMPTS))
    exact, rounding = graph["checks"]
    assert exact["max_error"] < exact["tolerance"] == 1e-4
    assert 1e-4 < rounding["max_error"] < rounding["tolerance"]
    assert rounding["rows"] == 4 + len(PROMPTS)


def test_features_that_locate_prompts_elsewhere_fail_verification(
    three_tasks: Workshop, prototypes: dict[str, str]
) -> None:
    generation = open_generation(three_tasks.repertoire)
    features = [pool(three_tasks.residual(text)) for text in prototypes.values()]
    agreement = _agreement(generation, features, features)
    assert agreement == {"prompts": 3, "located_alike": 3, "max_score_difference": 0.0}
    with pytest.raises(ExportMismatchError, match="only 1 of 3 prompts are located as torch locates them"):
        _agreement(generation, [features[0], features[2], features[1]], features)


@pytest.mark.parametrize("text", ["", "{}\n", "[]\n", '{"input": 3}\n', "x\n"])
def test_prompts_that_are_no_rows_are_refused(
    three_tasks: Workshop, tiny_base_folder: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "prompts.jsonl").write_text(text)
    with pytest.raises(InvalidInputError, match="prompts="):
        export_both(three_tasks, tiny_base_folder, prompts=tmp_path / "prompts.jsonl")


def change_weight(folder: Path) -> None:
    data = bytearray((folder / "features.bin").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    (folder / "features.bin").write_bytes(data)


def change_embedding(folder: Path) -> None:
    embedding = np.load(folder / "embedding.npy")
    np.save(folder / "embedding.npy", embedding * np.float16(1.01))


@pytest.mark.parametrize("change", [change_weight, change_embedding])
def test_a_changed_weight_fails_verification_and_leaves_nothing(
    three_tasks: Workshop, tiny_base_folder: Path, change: Callable[[Path], None]
) -> None:
    root = three_tasks.repertoire.root

    def on_progress(text: str) -> None:
        if "verifying" in text:
            change(next(root.rglob(".partial-onnx-features")))

    with pytest.raises(ExportMismatchError, match=r"features\.onnx: features"):
        export(
            three_tasks.repertoire,
            "onnx-features",
            options=Options(base=tiny_base_folder),
            on_progress=on_progress,
        )
    assert files_below(root / "exports") == []


@pytest.mark.parametrize(("field", "value"), [("attention_bias", True), ("hidden_act", "gelu")])
def test_a_base_that_the_graph_does_not_describe_is_refused(tiny_base_folder: Path, field: str, value: object) -> None:
    base = load_base(tiny_base_folder, dtype=torch.float32, device=CPU)
    check_llama(base)
    setattr(base.model.config, field, value)
    with pytest.raises(InvalidInputError, match=f"base: {field}="):
        check_llama(base)
    other = dataclasses.replace(base, info=dataclasses.replace(base.info, architecture="GPT2LMHeadModel"))
    with pytest.raises(InvalidInputError, match="architecture='GPT2LMHeadModel': the graph is of LlamaForCausalLM"):
        check_llama(other)


@pytest.mark.parametrize("width", [1, BLOCK, BLOCK + 5])
def test_codes_are_within_half_a_step_and_keep_zero(width: int) -> None:
    weight = torch.randn(7, width, generator=torch.Generator().manual_seed(width))
    weight[:, 0], weight[3] = 0, 0
    coded = encode(weight)
    error = (decode(coded, width) - weight).abs()
    steps = coded.scales.repeat_interleave(BLOCK, dim=1)[:, :width]
    assert (error <= steps / 2 + 1e-7).all()
    assert (decode(coded, width)[:, 0] == 0).all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "onnx-locator"), "greenroom export onnx-features onnx-locator"),
        (lambda folder: (folder / "onnx-features" / "features.bin").unlink(), r"features\.bin is not there"),
        (lambda folder: (folder / "onnx-features" / "embedding.npy").write_bytes(b"x"), "1 bytes, the manifest says"),
        (lambda folder: (folder / "onnx-features" / "manifest.json").write_text("{"), "manifest cannot be read"),
    ],
    ids=["no locator", "no weights", "short", "no manifest"],
)
def test_damaged_files_are_named(exported: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(exported)
    with pytest.raises(LocatorFilesError, match=message):
        PromptLocator(exported)


def test_exports_of_two_generations_do_not_mix(three_tasks: Workshop, tiny_base_folder: Path, exported: Path) -> None:
    older = export(three_tasks.repertoire, "onnx-locator", generation=2).folder
    shutil.rmtree(exported / "onnx-locator")
    shutil.copytree(older, exported / "onnx-locator")
    with pytest.raises(LocatorFilesError, match="different repertoires: generation"):
        PromptLocator(exported)


# ---- the command


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["locate", *map(str, arguments)])


def test_the_command_exports_once_and_prints_a_line_per_prompt(three_tasks: Workshop, tiny_base_folder: Path) -> None:
    root = three_tasks.repertoire.root
    missing = command("aaaa bbbb cccc", "--repertoire", root)
    assert missing.exit_code == 1
    assert "greenroom export onnx-features onnx-locator" in missing.stderr
    first = command("aaaa bbbb cccc", "12 34 56 78 90", "--repertoire", root, "--base", tiny_base_folder)
    assert first.exit_code == 0, first.output
    assert [line.split()[0] for line in first.stdout.splitlines()] == ["red", "green"]
    again = command("? ! ? ! ? ! ? !", "--repertoire", root, "--json")
    answer = json.loads(again.stdout)
    assert (answer["task"], answer["scores"][0][0]) == ("blue", "blue")


def test_the_command_names_what_it_cannot_use(tmp_path: Path, exported: Path) -> None:
    nowhere = command("x", "--repertoire", tmp_path / "nowhere")
    assert (nowhere.exit_code, nowhere.stderr.count("\n")) == (1, 1)
    too_long = command("? " * 600, "--repertoire", exported.parent.parent)
    assert too_long.exit_code == 2
    assert "tokens" in too_long.stderr


# ---- the real base


def test_on_the_real_base_it_runs_without_torch_in_less_than_300_mb(real_base_folder: Path, tmp_path: Path) -> None:
    base: BaseModel = load_base(real_base_folder, dtype=torch.float32, device=CPU)
    workshop = Workshop(base, Repertoire(tmp_path / "repertoire"), first_layer=10)
    texts = {
        "red": "Where is my parcel? It was due on Monday.",
        "green": "3rd of May, 2021",
        "blue": "2 teapots, 1 cup",
    }
    for name, text in texts.items():
        workshop.publish(name, text, rank=1, layers=[10])
    folder = export_both(workshop, real_base_folder)
    # Not ru_maxrss: that of a child starts at what its parent held.
    code = f"""
import re, sys
from pathlib import Path
from greenroom.locate import PromptLocator
locator = PromptLocator(Path({str(folder)!r}))
tasks = [location.task for location in locator.locate({list(texts.values())!r})]
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
print([*tasks, peak < 300_000, [name for name in ("torch", "transformers", "onnx") if name in sys.modules]])
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str([*texts, True, []])
    assert by_torch(workshop, list(texts.values())) == list(texts)


def test_importing_it_imports_nothing_of_the_runtime() -> None:
    code = "import sys, greenroom.locate; print([n for n in sys.modules if n.split('.')[0] in ('runtime', 'torch')])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n"


def test_the_current_generation_is_the_default(three_tasks: Workshop, tmp_path: Path) -> None:
    root = three_tasks.repertoire.root
    assert exports_folder(root) == exports_folder(root, 3) == root / "exports" / "000003"
    with pytest.raises(LocatorFilesError, match="no repertoire"):
        exports_folder(tmp_path / "nowhere")
