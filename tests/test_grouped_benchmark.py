"""The comparison of ways to mix experts on composite questions: what is compared is comparable, and counted right."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch

from runtime.model.base import BaseModel
from training.batches import Row
from training.composite_data import INTENTS
from training.grouped import GroupedRouting

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import grouped

LABELS = ("function", "function", "domain", "domain", "style", "style")


def test_a_flat_softmax_has_the_parameters_of_a_grouped_router_and_one_level() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = grouped.FlatRouting(LABELS, 8, generator)
    levels = GroupedRouting(grouped.grouping_of(LABELS), LABELS, 8, has_general=False, generator=generator)
    sizes = [sorted(parameter.shape for parameter in routing.parameters()) for routing in (flat, levels)]
    assert sizes[0] == sizes[1]
    x = torch.randn(5, 8, generator=generator)
    torch.testing.assert_close(flat(x).sum(1), torch.ones(5))
    flat.group_bias.data[1] += 50.0
    assert flat(x)[:, 2:4].sum(1).min() > 0.999


def test_static_weights_are_learned_and_do_not_look_at_the_token() -> None:
    routing = grouped.StaticRouting(LABELS)
    weights = routing(torch.randn(3, 8))
    torch.testing.assert_close(weights, torch.full((3, 6), 1 / 6))
    weights[:, 0].sum().backward()  # type: ignore[no-untyped-call]
    assert routing.bias.grad is not None
    assert routing.bias.grad[0] > 0


def test_a_part_is_right_where_every_token_of_it_is_the_likeliest(tiny_base: BaseModel) -> None:
    rows = []
    for prompt in ((1, 40, 50), (1, 60), (1, 70, 80, 90)):
        answer: list[int] = []
        while len(answer) < 3:
            logits = tiny_base.model(torch.tensor([[*prompt, *answer]])).logits[0, -1]
            answer.append(int(logits.argmax()))
        rows.append(Row(prompt, tuple(answer)))
    last_wrong = Row(rows[1].prompt, (*rows[1].answer[:2], (rows[1].answer[2] + 1) % 250))
    with torch.inference_mode():
        assert list(grouped.all_likeliest(tiny_base, rows)) == [True] * 3
        assert list(grouped.all_likeliest(tiny_base, [rows[0], last_wrong, rows[2]])) == [True, False, True]


def test_every_way_is_asked_the_same_and_what_is_finished_is_not_done_again(
    tiny_base_folder: Path, tmp_path: Path
) -> None:
    def run() -> dict[str, dict[str, float]]:
        grouped.main(
            base=str(tiny_base_folder),
            seeds="0",
            train_rows=12,
            test_rows=2,
            max_steps=1,
            batch_size=2,
            work=tmp_path / "work",
            output=tmp_path / "result.json",
        )
        methods: dict[str, dict[str, float]] = json.loads((tmp_path / "result.json").read_text())["methods"]
        return methods

    first = run()
    assert set(first) == {
        *("arrow_top_1", "arrow_top_2", "uniform", "best_single", "told"),
        *("grouped", "flat", "static"),
    }
    assert first["grouped"]["trained_parameters"] == first["flat"]["trained_parameters"] > 0
    for method, (figure, end) in itertools.product(first.values(), itertools.product(grouped.FIGURES, ("", "_sd"))):
        assert 0 <= method[f"{figure}{end}"] <= 100
    assert {path.name for path in (tmp_path / "work").glob("data-*/*")} == {*INTENTS, "composite"}

    kept = next((tmp_path / "work").glob("*/grouped-0.json"))
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "parts": 77.0}))
    experts = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("experts-*/generations/*")}
    assert run() == {**first, "grouped": {**first["grouped"], "parts": 77.0}}
    assert {path: path.stat().st_mtime_ns for path in experts} == experts
    assert len(experts) >= len(INTENTS)
