"""Methods compared on the tiny base: what is measured, what is promised, and what happens after an interruption."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.errors import InvalidInputError
from runtime.model.attach import attached
from runtime.model.base import BaseModel
from runtime.model.prompt import default_template
from training.answer_book import AnswerBook
from training.answers import Question, fingerprint, greedy_answers
from training.config import TrainingConfig
from training.contenders import DENSE_EXPERTS, GrowingContender, contender
from training.contest import CONTENDERS, Contest, Record, run_contest
from training.contest_result import result_of, table
from training.forgetting_curve import draw_forgetting_curve
from training.metrics import continual_metrics
from training.shared_adapter import SharedAdapter
from training.subject import Subject, other_tasks, read_subject

CONFIG = TrainingConfig(max_steps=8, epochs=8, learning_rate=1e-2, rank=4, locator_steps=30, batch_size=8)
CONFIG = replace(CONFIG, expansion="paper", probe_steps=2, probe_share=0.3)
TASKS = {"letters": {"a": "1", "Z": "2"}, "signs": {"+": "p", "=": "e"}, "digits": {"3": "x", "8": "y"}}
STRANGERS = {"marks": {"?": "!", ";": "."}}
COSTS = ("learn_s", "score_s")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task folders: one letter many times over, and the letter's own answer."""
    folder = tmp_path_factory.mktemp("data")
    for name, mapping in (TASKS | STRANGERS).items():
        (folder / name).mkdir()
        rows = [{"input": letter * (9 + i), "output": out} for i in range(12) for letter, out in mapping.items()]
        for part, kept in (("train", rows), ("test", rows[::3])):
            (folder / name / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    return folder


def contest_on(data: Path, *contenders: str) -> Contest:
    return Contest(
        data=data,
        tasks=tuple(TASKS),
        strangers=tuple(STRANGERS),
        contenders=contenders,
        train_rows=24,
        test_rows=6,
        first_layer=2,
    )


def run(base: BaseModel, contest: Contest, work: Path, config: TrainingConfig = CONFIG) -> dict[str, list[Record]]:
    return run_contest(base, contest, config, work, on_stage=lambda *_told: None)


def result(runs: Mapping[int, Mapping[str, Sequence[Record]]]) -> dict[str, Any]:
    return result_of(runs, tasks=tuple(TASKS), lookalikes=("letters", "signs"))


def without_costs(records: Mapping[str, Sequence[Record]]) -> dict[str, list[Record]]:
    return {
        name: [{key: value for key, value in record.items() if key not in COSTS} for record in stages]
        for name, stages in records.items()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base: BaseModel, data: Path) -> tuple[Path, dict[str, Any]]:
    """Every contender, one seed, never interrupted: its work folder and its records."""
    work = tmp_path_factory.mktemp("work")
    return work, run(tiny_base, contest_on(data, *CONTENDERS), work)


def subject_of(base: BaseModel, data: Path, name: str) -> Subject:
    return read_subject(base, data / name, train_rows=24, test_rows=6, config=CONFIG)


# ---- what is measured


def test_every_method_is_measured_and_every_figure_is_in_its_range(whole: tuple[Path, dict[str, Any]]) -> None:
    found = result({0: whole[1]})
    located = [f"{name}_{how}" for name in ("per_task", "everywhere", "pgke") for how in ("oracle", "locator")]
    assert set(found["methods"]) == {"zero_shot", "sequential_lora", "moelora", *located}
    for method in found["methods"].values():
        assert all(0 <= method[key] <= 100 for key in ("mft", "mfn", "maa"))
        assert -100 <= method["bwt"] <= 100
        assert len(method["curve"]) == 3
    rates = ("accuracy_distinct", "accuracy_lookalike", "abstain_recall", "false_abstain")
    assert all(0 <= found["locator"][rate] <= 1 for rate in rates)
    assert {name: sum(counts.values()) for name, counts in found["locator"]["strangers"][0].items()} == {"marks": 6}
    assert [sum(counts.values()) for counts in found["locator"]["decisions"][0].values()] == [6, 6, 6]
    assert json.loads(json.dumps(found)) == found


def test_figures_are_the_metrics_of_the_recorded_scores(whole: tuple[Path, dict[str, Any]]) -> None:
    records = whole[1]["sequential_lora"]
    wanted = continual_metrics([[100 * score for score in record["given"]] for record in records])
    found = result({0: whole[1]})["methods"]["sequential_lora"]
    assert (found["mft"], found["bwt"]) == (pytest.approx(wanted.mft, abs=1e-3), pytest.approx(wanted.bwt, abs=1e-3))
    assert found["mft"] > 0


def test_what_is_trained_is_counted(whole: tuple[Path, dict[str, Any]]) -> None:
    methods = result({0: whole[1]})["methods"]
    lora = 2 * 4 * (3 * 64 + 3 * 128)
    routers = 2 * 64
    assert methods["zero_shot"]["trained_parameters"] == 0
    assert methods["sequential_lora"]["trained_parameters"] == lora
    assert methods["moelora"]["trained_parameters"] == DENSE_EXPERTS * (lora + routers)
    assert methods["per_task_oracle"]["trained_parameters"] == 3 * (lora + routers)
    assert methods["everywhere_oracle"]["trained_parameters"] == 3 * lora + (1 + 2 + 3) * routers
    share = methods["pgke_oracle"]["trained_parameters"] / methods["everywhere_oracle"]["trained_parameters"]
    assert result({0: whole[1]})["expansion"]["parameter_share"] == pytest.approx(share, abs=1e-3)
    assert 1 / 3 < share <= 1
    per_task = whole[1]["per_task"][-1]
    assert per_task["parameters_locating"] > per_task["parameters"]


def test_the_seeds_are_averaged_and_their_spread_is_told(
    whole: tuple[Path, dict[str, Any]], tiny_base: BaseModel, data: Path
) -> None:
    contest = contest_on(data, "zero_shot", "sequential_lora")
    first = {name: whole[1][name] for name in contest.contenders}
    other = run(tiny_base, contest, whole[0], replace(CONFIG, seed=1))
    method = result({0: first, 1: other})["methods"]["sequential_lora"]
    each = [result({0: records})["methods"]["sequential_lora"] for records in (first, other)]
    assert method["mft"] == pytest.approx((each[0]["mft"] + each[1]["mft"]) / 2, abs=1e-3)
    assert method["sd"]["mft"] == pytest.approx(abs(each[0]["mft"] - each[1]["mft"]) / 2**0.5, abs=1e-3)
    assert "±" in table(result({0: first, 1: other}))
    assert whole[1]["zero_shot"][-1]["given"] == other["zero_shot"][-1]["given"]


def test_the_table_and_the_curve_hold_every_method(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    found = result({0: whole[1]})
    lines = table(found).splitlines()
    assert len(lines) == 2 + len(found["methods"])
    draw_forgetting_curve(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


# ---- what is promised


def test_old_outputs_stay_bit_identical_where_that_is_promised(whole: tuple[Path, dict[str, Any]]) -> None:
    found = result({0: whole[1]})
    growing = [name for name, kept in found["old_outputs_bit_identical"].items() if name != "zero_shot"]
    assert growing == ["per_task", "everywhere", "pgke"]
    assert all(found["old_outputs_bit_identical"].values())
    for name in growing:
        assert found["methods"][f"{name}_oracle"]["bwt"] == 0.0
        stages = whole[1][name]
        assert [record["fingerprints"]["letters"] for record in stages] == [stages[0]["fingerprints"]["letters"]] * 3


def test_what_is_shared_and_trained_on_moves_the_old_outputs(whole: tuple[Path, dict[str, Any]]) -> None:
    assert whole[1]["sequential_lora"][2]["moved"] == ["letters", "signs"]
    assert whole[1]["moelora"][1]["moved"] == ["letters"]
    assert "sequential_lora" not in result({0: whole[1]})["old_outputs_bit_identical"]


def test_a_prompt_that_is_located_nowhere_is_answered_by_the_base(
    tiny_base: BaseModel, data: Path, tmp_path: Path
) -> None:
    strict = replace(CONFIG, locator_steps=1)
    records = run(tiny_base, contest_on(data, "zero_shot", "per_task"), tmp_path, strict)
    for record in records["per_task"]:
        for name, counts in record["decisions"].items():
            if counts == {"none": 6}:
                place = list(TASKS).index(name)
                assert record["located"][place] == records["zero_shot"][-1]["given"][place]


# ---- a locator fitted anew


def test_a_locator_fitted_anew_in_the_same_way_decides_the_same(
    whole: tuple[Path, dict[str, Any]], tiny_base: BaseModel, data: Path, tmp_path: Path
) -> None:
    work = shutil.copytree(whole[0], tmp_path / "work")
    again = run(tiny_base, replace(contest_on(data, "sequential_lora", "per_task", "pgke"), relocate=True), work)
    wanted = {name: [dict(record) for record in whole[1][name]] for name in again}
    for records in (wanted["per_task"], wanted["pgke"]):
        for record in records[:-1]:
            record["strangers"] = {}
    assert again == wanted


def test_another_locator_is_measured_on_experts_that_stay(
    whole: tuple[Path, dict[str, Any]], tiny_base: BaseModel, data: Path, tmp_path: Path
) -> None:
    work = shutil.copytree(whole[0], tmp_path / "work")
    strict = replace(CONFIG, locator_density="vae", locator_steps=1, locator_false_abstain=0.9)
    before = {path: path.read_bytes() for path in (work / "seed0").rglob("*") if path.is_file()}
    with pytest.raises(InvalidInputError, match="was made with another locator_density"):
        run(tiny_base, contest_on(data, "per_task"), work, strict)
    found = run(tiny_base, replace(contest_on(data, "per_task"), relocate=True), work, strict)["per_task"]
    stored = whole[1]["per_task"]
    assert [record["given"] for record in found] == [record["given"] for record in stored]
    assert [record["decisions"] for record in found] != [record["decisions"] for record in stored]
    assert {path: path.read_bytes() for path in before} == before


# ---- interruptions


@pytest.mark.parametrize("lost", ["stage-1.json", "stage-2.json"])
def test_an_interrupted_run_ends_with_the_same_records(
    whole: tuple[Path, dict[str, Any]], tiny_base: BaseModel, data: Path, tmp_path: Path, lost: str
) -> None:
    work = shutil.copytree(whole[0], tmp_path / "work")
    names = ("sequential_lora", "per_task", "pgke")
    for name in names:
        for path in (work / "seed0" / name).glob("stage-*.json"):
            if path.name >= lost:
                path.unlink()
    shutil.rmtree(work / "answers")
    stage = int(lost[6])
    (work / "seed0" / "sequential_lora" / f"state-{stage}.safetensors").unlink()
    again = run(tiny_base, contest_on(data, *names), work)
    assert without_costs(again) == without_costs({name: whole[1][name] for name in names})


def test_a_finished_run_computes_nothing_again(
    whole: tuple[Path, dict[str, Any]], tiny_base: BaseModel, data: Path, tmp_path: Path
) -> None:
    work = shutil.copytree(whole[0], tmp_path / "work")
    for path in (*work.rglob("*.safetensors"), *work.rglob("HEAD")):
        path.unlink()
    assert run(tiny_base, contest_on(data, *CONTENDERS), work) == whole[1]


def test_a_folder_of_other_settings_is_refused(
    whole: tuple[Path, dict[str, Any]], tiny_base: BaseModel, data: Path
) -> None:
    with pytest.raises(InvalidInputError, match="was made with another rank, test_rows"):
        run(tiny_base, replace(contest_on(data, "zero_shot"), test_rows=5), whole[0], replace(CONFIG, rank=2))


# ---- parts


def test_answers_in_a_batch_are_those_of_one_prompt_alone(tiny_base: BaseModel) -> None:
    template = default_template(tiny_base)
    texts = ["a", "bb bb bb", "1 2 3 4 5 6", "?"]
    asked = [Question(tuple(template.encode(tiny_base.tokenizer, text)), "", 6) for text in texts]
    alone = [greedy_answers(tiny_base, [one])[0] for one in asked]
    assert greedy_answers(tiny_base, asked, batch_size=3) == alone
    ids = list(asked[1].prompt)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(tiny_base.model(torch.tensor([ids])).logits[0, -1].argmax()))
    wanted = ids[len(asked[1].prompt) :]
    ends = [i for i, token in enumerate(wanted) if token in tiny_base.eos_token_ids]
    assert alone[1] == tiny_base.tokenizer.decode(wanted[: ends[0]] if ends else wanted)


def test_an_answer_given_once_is_not_asked_for_again(tiny_base: BaseModel, data: Path, tmp_path: Path) -> None:
    book, subject = AnswerBook(tiny_base, tmp_path), subject_of(tiny_base, data, "letters")
    who = book.identify({}, subject)
    given = book.answers(who, {}, subject)
    path = next(tmp_path.glob("*.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "2": "kept"}))
    assert book.answers(who, {}, subject, [2, 0]) == ["kept", given[0]]


def test_a_fingerprint_tells_one_mixture_from_another(tiny_base: BaseModel, data: Path) -> None:
    adapter = SharedAdapter(tiny_base, name="one", num_experts=1, first_layer=3, config=CONFIG)
    subject = subject_of(tiny_base, data, "letters")
    alone = fingerprint(tiny_base, subject.prompts)
    with attached(tiny_base.model, adapter.ffns):
        assert fingerprint(tiny_base, subject.prompts) == alone
        with torch.no_grad():
            next(iter(adapter.ffns[3].experts.parameters())).add_(1)
            adapter.ffns[3].experts[0].b["down"].add_(1e-3)  # type: ignore[index, union-attr, operator]
        assert fingerprint(tiny_base, subject.prompts) != alone
    assert fingerprint(tiny_base, subject.prompts) == alone


def test_a_shared_adapter_comes_back_from_its_file(tiny_base: BaseModel, data: Path, tmp_path: Path) -> None:
    first = contender("moelora", tiny_base, tmp_path, first_layer=2, config=CONFIG)
    subject = subject_of(tiny_base, data, "signs")
    first.learn(0, subject)
    again = contender("moelora", tiny_base, tmp_path, first_layer=2, config=CONFIG)
    again.learn(0, subject)
    for layer, ffn in first.ffns("signs").items():
        other = again.ffns("signs")[layer]
        assert torch.equal(ffn.router, other.router)
        for one, two in zip(ffn.experts.parameters(), other.experts.parameters(), strict=True):
            assert torch.equal(one, two)
    assert len(next(iter(first.ffns("signs").values())).experts) == DENSE_EXPERTS


def test_a_growing_contender_takes_up_the_generation_of_its_stage(
    whole: tuple[Path, dict[str, Any]], tiny_base: BaseModel, data: Path
) -> None:
    grown = GrowingContender(tiny_base, "per_task", whole[0] / "seed0" / "per_task", first_layer=2, config=CONFIG)
    grown.learn(0, subject_of(tiny_base, data, "letters"))
    early = grown.num_parameters(locating=True)
    grown.learn(2, subject_of(tiny_base, data, "digits"))
    assert grown.num_parameters(locating=True) == 3 * early


def test_rows_differ_with_the_seed_and_questions_do_not(tiny_base: BaseModel, data: Path) -> None:
    def read(seed: int) -> Subject:
        config = replace(CONFIG, seed=seed)
        return read_subject(tiny_base, data / "signs", train_rows=10, test_rows=4, config=config)

    assert read(0).data.train != read(1).data.train
    assert read(0).questions == read(1).questions
    assert (len(read(0).rows), len(read(0).questions)) == (10, 4)
    assert read(0) == read(0)


def test_tasks_that_nobody_learns_are_all_the_others(data: Path) -> None:
    assert other_tasks(data, tuple(TASKS)) == ("marks",)
