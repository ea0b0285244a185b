"""Probe-guided growth: probes measure, policies decide, old outputs stay, and what was made is served and reported."""

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
from runtime.errors import DataError, InvalidInputError
from runtime.model.attach import attached, fresh_expert, load_mixture
from runtime.model.base import BaseModel
from runtime.model.expert import Expert
from runtime.model.generation import base_ref, open_generation
from runtime.model.repertoire import Repertoire
from training.batches import Row
from training.config import TrainingConfig
from training.data import Example, TaskData
from training.expansion import LayerUse
from training.grow import add_task
from training.held_out import held_out_loss
from training.mixtures import copied_expert, cosine, fresh_experts, new_mixture
from training.pictures import draw_growth
from training.probe import probe, split_probe_rows
from training.report import TaskReport, read_reports

CONFIG = TrainingConfig(
    first_layer=1, max_steps=6, learning_rate=1e-2, locator_steps=5, store_dtype="float32", rank=4, probe_steps=3
)
FIRST_LAYER = 1


def task_of(name: str, letters: str) -> TaskData:
    rows = [Example(letter * (10 + i), str(j)) for j, letter in enumerate(letters) for i in range(12)]
    return TaskData(name, tuple(rows), tuple(rows[:4]))


def tiny_rows(num: int) -> list[Row]:
    return [Row((1, 5 + i % 7, 6), (20 + i % 3, 2)) for i in range(num)]


def an_expert_set(base: BaseModel, layers: range, seed: int, *, rank: int = 4) -> dict[int, Expert]:
    generator = torch.Generator().manual_seed(seed)
    experts = {}
    for layer in layers:
        experts[layer] = fresh_expert(layer, rank=rank, alpha=8.0, base=base_ref(base.info), generator=generator)
        for update in experts[layer].updates.values():
            update.b.copy_(torch.randn(update.b.shape, generator=generator) * 0.1)
    return experts


def grown(root: Path, base: BaseModel, config: TrainingConfig, *names: str) -> tuple[Repertoire, list[TaskReport]]:
    repertoire = Repertoire(root / "rep")
    for name, letters in zip(names, ("aZ3?", "+q=7", "xyzw"), strict=False):
        add_task(repertoire, base, task_of(name, letters), config, report_folder=root / "reports" / name)
    return repertoire, list(read_reports(root / "reports"))


def task_logits(repertoire: Repertoire, base: BaseModel, task: str, generation: int | None = None) -> torch.Tensor:
    opened = open_generation(repertoire, generation)
    ids = torch.tensor([opened.template.encode(base.tokenizer, "aaa ZZZ +++ qqq")])
    with torch.no_grad(), attached(base.model, load_mixture(repertoire, opened, task, base.model)):
        logits: torch.Tensor = base.model(ids).logits
    return logits


# ---- probing


def test_the_probe_split_takes_its_share_and_no_row_twice() -> None:
    rows = [Row((i,), (2,)) for i in range(100)]
    split = split_probe_rows(rows, share=0.1, seed=3)
    assert (len(split.train), len(split.measure)) == (5, 5)
    assert len({*split.train, *split.measure}) == 10
    assert split == split_probe_rows(rows, share=0.1, seed=3)
    assert split != split_probe_rows(rows, share=0.1, seed=4)
    assert len(split_probe_rows(rows[:2], share=0.1, seed=0).measure) == 1
    with pytest.raises(InvalidInputError, match="examples=1: probing needs 2"):
        split_probe_rows(rows[:1], share=0.1, seed=0)


def test_probing_measures_every_layer_and_leaves_base_and_old_experts_alone(tiny_base: BaseModel) -> None:
    old = [an_expert_set(tiny_base, range(1, 4), 1), an_expert_set(tiny_base, range(2, 3), 2)]
    copies = [u.b.clone() for experts in old for e in experts.values() for u in e.updates.values()]
    before = {name: tensor.clone() for name, tensor in tiny_base.model.state_dict().items()}
    found = probe(tiny_base, tiny_rows(60), old, name="new", first_layer=1, config=CONFIG, masks=True)
    assert {layer: use.members for layer, use in found.layers.items()} == {1: (0,), 2: (0, 1), 3: (0,)}
    assert {layer: len(use.frequencies) for layer, use in found.layers.items()} == {1: 2, 2: 3, 3: 2}
    assert (found.num_train, found.num_measure) == (3, 3)
    assert all(use.rise is not None for use in found.layers.values())
    for layer, use in found.layers.items():
        # min(K, E - 1) experts are counted per token: one of two, two of three.
        assert sum(use.frequencies) == pytest.approx(2.0 if layer == 2 else 1.0)
    after = tiny_base.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    now = [u.b for experts in old for e in experts.values() for u in e.updates.values()]
    assert all(map(torch.equal, now, copies))


def test_probing_twice_gives_the_same(tiny_base: BaseModel) -> None:
    old = [an_expert_set(tiny_base, range(1, 4), 1)]
    one, same = (
        probe(tiny_base, tiny_rows(40), old, name="new", first_layer=1, config=CONFIG, masks=True) for _ in range(2)
    )
    other = probe(tiny_base, tiny_rows(40), old, name="other", first_layer=1, config=CONFIG, masks=False)
    assert one == same
    assert other.held_out_loss != one.held_out_loss
    assert {use.rise for use in other.layers.values()} == {None}


def test_a_probe_that_the_answers_need_is_missed_when_it_is_masked(tiny_base: BaseModel) -> None:
    config = dataclasses.replace(CONFIG, probe_steps=60, probe_share=0.9)
    old = [an_expert_set(tiny_base, range(3, 4), 1)]
    found = probe(tiny_base, tiny_rows(30), old, name="new", first_layer=3, config=config, masks=True)
    rise = found.layers[3].rise
    assert rise is not None
    assert rise > 1.0


def test_held_out_loss_counts_real_tokens_and_answer_tokens_alone(tiny_base: BaseModel) -> None:
    ffns = new_mixture(
        tiny_base, [an_expert_set(tiny_base, range(3, 4), 1)], {}, name="n", first_layer=1, config=CONFIG
    )
    rows = [*tiny_rows(7), Row(tuple(range(3, 60)), (9, 2))]
    together = held_out_loss(tiny_base, ffns, rows, batch_size=8)
    apart = held_out_loss(tiny_base, ffns, rows[::-1], batch_size=3)
    assert sorted(ffns) == [3]
    assert together[0] == pytest.approx(apart[0], abs=1e-5)
    assert together[1][3].tolist() == [1.0]


# ---- where new experts begin


def test_a_copied_expert_is_the_same_update_at_another_scale(tiny_base: BaseModel) -> None:
    source = an_expert_set(tiny_base, range(2, 3), 1)[2]
    copy = copied_expert(source, scale=7.0)
    for target, update in source.updates.items():
        torch.testing.assert_close(
            7.0 * copy.updates[target].b @ copy.updates[target].a, source.scale * update.b @ update.a
        )
    assert cosine(copy, source) == pytest.approx(1.0)


def test_the_cosine_of_updates_is_that_of_their_matrices(tiny_base: BaseModel) -> None:
    one, other = (an_expert_set(tiny_base, range(2, 3), seed, rank=rank)[2] for seed, rank in ((1, 4), (2, 2)))
    full = [torch.cat([(u.b @ u.a).flatten() for _, u in sorted(e.updates.items())]) for e in (one, other)]
    assert cosine(one, other) == pytest.approx(float(torch.cosine_similarity(*full, dim=0)), abs=1e-5)
    nothing = fresh_experts(tiny_base, [2], CONFIG, seed_name="x")[2]
    assert cosine(one, nothing) == 0.0


def test_a_fresh_expert_does_not_depend_on_which_other_layers_get_one(tiny_base: BaseModel) -> None:
    all_layers = fresh_experts(tiny_base, [1, 2, 3], CONFIG, seed_name="x")
    one = fresh_experts(tiny_base, [3], CONFIG, seed_name="x")
    assert torch.equal(all_layers[3].updates["gate"].a, one[3].updates["gate"].a)
    assert not torch.equal(all_layers[2].updates["gate"].a, one[3].updates["gate"].a)


# ---- growing a repertoire


@pytest.mark.parametrize(
    "settings",
    [
        {"expansion": "paper"},
        {"expansion": "paper", "expansion_axis": "experts", "expansion_alpha": 0.5},
        {"expansion": "calibrated", "expansion_tolerance": 1e9},
    ],
    ids=["over layers", "over experts", "nothing"],
)
def test_growth_leaves_old_outputs_bit_identical_and_reports_what_it_did(
    tiny_base: BaseModel, tmp_path: Path, settings: dict[str, object]
) -> None:
    config = dataclasses.replace(CONFIG, **settings)
    repertoire, reports = grown(tmp_path, tiny_base, config, "first", "second", "third")
    assert [(report.task, report.generation) for report in reports] == [("first", 1), ("second", 2), ("third", 3)]
    for number in (1, 2):
        for task in ("first", "second")[:number]:
            assert torch.equal(
                task_logits(repertoire, tiny_base, task, number), task_logits(repertoire, tiny_base, task)
            )
    manifest = repertoire.manifest()
    first, second, third = reports
    assert [layer.expanded for layer in first.layers] == [True] * 3
    assert first.probe_rows is None
    assert first.parameters_added == first.parameters_everywhere
    for report in (second, third):
        task = manifest.task(report.task)
        expanded = [layer.layer for layer in report.layers if layer.expanded]
        own = [unit.layer for unit in manifest.expert_set(task.experts).units] if task.experts else []
        assert expanded == own
        assert report.parameters_added <= report.parameters_everywhere
        assert (report.parameters_added < report.parameters_everywhere) == (len(expanded) < 3)
        assert all(layer.frequency is not None and 0 <= layer.frequency <= 1 for layer in report.layers)
        for layer in report.layers:
            assert (layer.copied_from is not None) == layer.expanded
            assert (layer.cosine is not None) == layer.expanded
    assert open_generation(repertoire).faults == {}


def test_a_router_sees_only_old_experts_where_its_task_was_not_expanded(tiny_base: BaseModel, tmp_path: Path) -> None:
    def calibrated(folder: str, tolerance: float) -> tuple[Repertoire, list[TaskReport]]:
        probing = {"probe_steps": 40, "probe_share": 0.9}
        config = dataclasses.replace(CONFIG, expansion="calibrated", expansion_tolerance=tolerance, **probing)
        return grown(tmp_path / folder, tiny_base, config, "first", "second")

    rises = {layer.layer: layer.rise or 0.0 for layer in calibrated("nothing", 1e9)[1][1].layers}
    wanted = max(rises, key=lambda layer: rises[layer])
    others = max(rise for layer, rise in rises.items() if layer != wanted)
    repertoire, reports = calibrated("one", (rises[wanted] + max(0.0, others)) / 2)
    opened = open_generation(repertoire)
    old, new = (task.experts for task in opened.manifest.tasks)
    seen = {layer: router.experts for layer, router in opened.mixture("second").routers.items()}
    assert seen == {layer: (old, new) if layer == wanted else (old,) for layer in (1, 2, 3)}
    assert [unit.layer for unit in opened.manifest.experts[1].units] == [wanted]
    assert reports[1].settings["tolerance"] > 0


def test_a_copied_expert_starts_from_the_most_used_and_may_start_fresh_instead(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    everything = {"expansion": "paper", "expansion_alpha": 50.0}
    copied, fresh = (
        grown(tmp_path / start, tiny_base, dataclasses.replace(CONFIG, **everything, expert_start=start), "a", "b")
        for start in ("copy", "fresh")
    )
    digest = copied[0].manifest().tasks[0].experts
    layers = [layer for layer in copied[1][1].layers if layer.expanded]
    assert layers
    assert all(layer.copied_from == digest and list(layer.frequencies) == [digest] for layer in layers)
    assert all(layer.cosine is not None and 0.0 < layer.cosine < 0.9999 for layer in layers)
    assert all(layer.copied_from is None and layer.cosine is None for layer in fresh[1][1].layers)


# ---- serving what has grown


def test_the_engine_serves_a_task_without_any_expert_of_its_own(
    tiny_base: BaseModel, tmp_path: Path, make_engine: Callable[..., Engine]
) -> None:
    nothing = dataclasses.replace(CONFIG, expansion="calibrated", expansion_tolerance=1e9)
    repertoire, _ = grown(tmp_path, tiny_base, nothing, "first", "second")
    workshop = Workshop(tiny_base, repertoire, first_layer=FIRST_LAYER)
    assert repertoire.manifest().task("second").experts is None
    check_served(workshop, make_engine(workshop), ("second", "first", "second"))


def test_the_engine_serves_tasks_that_have_experts_in_some_layers_only(
    workshop: Workshop, make_engine: Callable[..., Engine]
) -> None:
    workshop.publish("high", "aaaa", layers=[3])
    workshop.publish("low", "1234", layers=[2])
    check_served(workshop, make_engine(workshop), ("high", "low", "high"))


def check_served(workshop: Workshop, engine: Engine, tasks: tuple[str, ...]) -> None:
    asked = [(task, ask(engine, "aaa +++", task=task, max_tokens=4)) for task in tasks]
    for task, answer in asked:
        wanted = workshop.reference("aaa +++", task, 4)
        torch.testing.assert_close(answer.wait().logits(wanted.shape[1]), wanted, rtol=0, atol=2e-4)
        visible = workshop.repertoire.manifest().task(task).router.visible
        assert {use.digest for use in answer.located.experts} == set(visible)


# ---- reports and pictures


def test_a_report_survives_its_file_and_a_broken_file_is_named(tiny_base: BaseModel, tmp_path: Path) -> None:
    _, reports = grown(tmp_path, tiny_base, dataclasses.replace(CONFIG, expansion="paper"), "first", "second")
    path = tmp_path / "reports/second/report.json"
    assert path.read_bytes() == reports[1].to_json()
    assert json.loads(path.read_bytes())["policy"] == "paper"
    assert reports[1].settings == {"axis": "layers", "alpha": 0.0}
    path.write_text("{}")
    with pytest.raises(DataError, match=r"second/report\.json: is not a report"):
        read_reports(tmp_path / "reports")


def test_growth_is_drawn_as_a_picture_of_layers_and_tasks(tiny_base: BaseModel, tmp_path: Path) -> None:
    _, reports = grown(tmp_path, tiny_base, CONFIG, "first")
    draw_growth(reports, tmp_path / "pictures" / "growth.png")
    assert (tmp_path / "pictures" / "growth.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InvalidInputError, match="there is nothing to draw"):
        draw_growth([], tmp_path / "none.png")


def test_a_layer_with_no_old_expert_has_no_source(tiny_base: BaseModel) -> None:
    found = probe(
        tiny_base,
        tiny_rows(20),
        [an_expert_set(tiny_base, range(2, 3), 1)],
        name="n",
        first_layer=2,
        config=CONFIG,
        masks=True,
    )
    assert found.layers[3] == LayerUse((), (1.0,), found.layers[3].rise)
    assert found.layers[3].most_used is None
