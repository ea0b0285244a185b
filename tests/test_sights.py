"""Where the locator looks: features, densities, scores and confusion; and what an engine can read of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engines import ask
from repertoires import Workshop

from runtime.engine.engine import Engine
from runtime.errors import InvalidInputError
from runtime.model.audit import audit
from runtime.model.base import BaseModel
from runtime.model.generation import open_generation
from runtime.model.locator import Decision
from runtime.model.repertoire import Repertoire
from training.config import TrainingConfig
from training.confusion import Confusion, confuse, draw_confusion, measure_confusion, write_confusion
from training.data import Example, TaskData
from training.features import features
from training.grow import add_task

CONFIG = TrainingConfig(first_layer=2, max_steps=1, locator_steps=60, store_dtype="float32", rank=2)
WORDS = {"animals": "cow goat hen owl fox", "digits": "12 305 77 4096 8"}


def inputs(name: str, start: int, num: int) -> list[str]:
    words = WORDS[name].split()
    return [" ".join(words[(i * k) % 5] for k in range(1, 4 + i % 3)) for i in range(start, start + num)]


def made(root: Path, base: BaseModel, **settings: object) -> Repertoire:
    repertoire = Repertoire(root)
    config = dataclasses.replace(CONFIG, **settings)  # type: ignore[arg-type]
    for name in WORDS:
        rows = tuple(Example(text, "x") for text in inputs(name, 1, 40))
        add_task(repertoire, base, TaskData(name, rows, rows[:2]), config)
    return repertoire


@pytest.mark.parametrize(
    ("feature", "density", "expected"),
    [
        (None, "low_rank", ("residual_parts", 2)),
        (None, "gaussian", ("residual_parts", 2)),
        (None, "vae", ("residual_mean", 2)),
        ("parts", "low_rank", ("residual_parts", 2)),
        *[
            (feature, density, expected)
            for density in ("low_rank", "vae")
            for feature, expected in (
                ("embedding", ("residual_mean", 0)),
                ("layer:1", ("residual_mean", 1)),
                ("last", ("residual_last", 4)),
            )
        ],
    ],
)
def test_a_new_repertoire_reads_prompts_where_it_is_told_and_tells_tasks_apart(
    tiny_base: BaseModel, tmp_path: Path, feature: str | None, expected: tuple[str, int], density: str
) -> None:
    repertoire = made(tmp_path, tiny_base, locator_feature=feature, locator_density=density)
    manifest = repertoire.manifest()
    assert (manifest.locator.feature, manifest.locator.layer) == expected
    assert (manifest.arrival.feature, manifest.arrival.layer) == ("residual_mean", 0)
    assert manifest.locator.density == manifest.arrival.density == density
    assert [task.locator.prototype is not None for task in manifest.tasks] == [density == "vae"] * 2
    assert not audit(repertoire, [1, 2]).faults
    found = measure_confusion(open_generation(repertoire), tiny_base, {name: inputs(name, 50, 20) for name in WORDS})
    assert found[0].accuracy + found[0].abstained > 0.95
    assert found[0].accuracy > 0.6


def test_the_last_feature_is_the_last_token_of_what_leaves_the_last_layer(tiny_base: BaseModel) -> None:
    prompts = [[1, 5, 9, 30], [1, 7], [4, 4, 4, 4, 4, 9]]
    found = features(tiny_base, prompts, 4, kind="residual_last")
    for prompt, row in zip(prompts, found, strict=True):
        with torch.no_grad():
            states = tiny_base.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(tiny_base.model.model.norm(row), states[-1][0, -1], rtol=1e-4, atol=1e-5)


def test_where_no_layer_lies_below_the_experts_a_new_repertoire_reads_the_embeddings(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    ref = made(tmp_path, tiny_base, first_layer=0).manifest().locator
    assert (ref.feature, ref.layer) == ("residual_mean", 0)


@pytest.mark.parametrize("feature", ["embedding", "layer:2", "parts"])
def test_the_engine_locates_from_the_embedding_or_where_the_experts_begin_or_from_both(
    tiny_base: BaseModel, tmp_path: Path, make_engine: Callable[..., Engine], feature: str
) -> None:
    repertoire = made(tmp_path, tiny_base, locator_feature=feature, locator_false_abstain=0.0)
    generation = open_generation(repertoire)
    engine = make_engine(Workshop(tiny_base, repertoire))
    ref = generation.manifest.locator
    for name in WORDS:
        text = inputs(name, 3, 1)[0]
        ids = generation.template.encode(tiny_base.tokenizer, text)
        wanted: Decision = generation.locator.locate(features(tiny_base, [ids], ref.layer, kind=ref.feature))[0]
        for located_only in (False, True):
            found = ask(engine, text, max_tokens=2, locate_only=located_only).wait().located
            assert found.task == wanted.task == name
            assert found.margin == pytest.approx(wanted.margin, rel=1e-3)


@pytest.mark.parametrize("feature", ["last", "layer:1", "layer:3"])
def test_the_engine_refuses_a_feature_from_where_it_does_not_stop(
    tiny_base: BaseModel, tmp_path: Path, make_engine: Callable[..., Engine], feature: str
) -> None:
    repertoire = made(tmp_path, tiny_base, locator_feature=feature)
    with pytest.raises(InvalidInputError, match=r"locator\.feature=.* the engine locates from"):
        make_engine(Workshop(tiny_base, repertoire), start=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"locator_feature": "layer:4"}, "locator_feature='layer:4': the base has 4 layers"),
        ({"locator_feature": "middle"}, "locator_feature='middle': must be embedding, layer:N, parts or last"),
        ({"locator_feature": "parts", "locator_density": "vae"}, "locator_feature='parts': needs a Gaussian density"),
        (
            {"locator_feature": "parts", "first_layer": 0},
            "locator_feature='parts': needs a Gaussian density and a first",
        ),
        ({"locator_score": "neg_elbo"}, "locator_score='neg_elbo': only the density vae has an ELBO"),
    ],
)
def test_a_sight_that_cannot_be_is_refused_by_name(
    tiny_base: BaseModel, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        made(tmp_path, tiny_base, **settings)


def test_a_confusion_matrix_counts_where_prompts_went_for_every_score(tiny_base: BaseModel, tmp_path: Path) -> None:
    generation = open_generation(made(tmp_path / "rep", tiny_base, locator_density="vae"))
    texts = {name: inputs(name, 50, 10) for name in WORDS}
    found = measure_confusion(generation, tiny_base, {**texts, "unknown": ["a"]})
    assert [each.score for each in found] == ["raw", "z", "abs_z", "neg_elbo"]
    assert all(each.tasks == tuple(WORDS) and [sum(row) for row in each.counts] == [10, 10] for each in found)
    write_confusion(tmp_path / "out" / "confusion.json", found)
    rows = json.loads((tmp_path / "out" / "confusion.json").read_text())
    assert [row["accuracy"] for row in rows] == [each.accuracy for each in found]
    draw_confusion(found, tmp_path / "out" / "confusion.png")
    assert (tmp_path / "out" / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_shares_of_a_confusion_matrix_are_of_all_prompts(tiny_base: BaseModel, tmp_path: Path) -> None:
    found = Confusion("raw", ("a", "b"), ((6, 1, 1), (0, 8, 0)), 0.5)
    assert found.accuracy == 14 / 16
    assert found.abstained == 1 / 16
    generation = open_generation(made(tmp_path, tiny_base))
    nothing = confuse(generation.locator, {})
    assert (nothing.accuracy, nothing.abstained, nothing.median_margin) == (0.0, 0.0, 0.0)
