"""What the demo's data promises: repeatable, disjoint, exactly scorable, short; and that the reference set is apart.

It does not know models.
Read first: answers are checked by reading the input again in another way, not by the grammar that made it.
"""

from __future__ import annotations

import calendar
import datetime as dt
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from runtime.errors import InvalidInputError
from runtime.model.names import check_name
from training.data import Example, read_tasks
from training.demo_data import DEMO_TASKS, INTENTS, NUM_TEST, NUM_TRAIN, demo_examples, write_demo_data
from training.reference_prompts import reference_kinds, reference_prompts

REFERENCE_SHA256 = "155292f76dce2bfd064e9f7e3708fee19a7f527f4cd8356bcffb11ab73a099c1"
MONTHS = tuple(month[:3].lower() for month in calendar.month_name[1:])
WORDS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
    "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth",
    "twentieth",
)  # fmt: skip


def all_examples(task: str) -> tuple[Example, ...]:
    return demo_examples(task, num=600, seed=7)


def test_the_written_folder_holds_three_tasks_of_the_promised_size(tmp_path: Path) -> None:
    write_demo_data(tmp_path)
    tasks = read_tasks(tmp_path)
    assert tuple(task.name for task in tasks) == DEMO_TASKS == ("date-iso", "order-json", "support-intent")
    assert {(len(task.train), len(task.test)) for task in tasks} == {(NUM_TRAIN, NUM_TEST)}
    assert NUM_TRAIN >= 400
    assert NUM_TEST >= 100


def test_no_test_input_is_a_train_input_even_in_other_case(tmp_path: Path) -> None:
    write_demo_data(tmp_path)
    for task in read_tasks(tmp_path):
        inputs = [example.input.casefold() for example in (*task.train, *task.test)]
        assert len(set(inputs)) == len(inputs)


def test_the_seed_decides_every_byte_on_every_python_run(tmp_path: Path) -> None:
    script = "import sys, pathlib, training.demo_data as d; d.write_demo_data(pathlib.Path(sys.argv[1]))"
    root = str(Path(__file__).parent.parent)
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": root}
        subprocess.run([sys.executable, "-c", script, str(tmp_path / hash_seed)], check=True, env=environment)
    files = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*.jsonl"))
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()


def test_another_seed_gives_other_rows() -> None:
    assert demo_examples("date-iso", num=50, seed=1) != demo_examples("date-iso", num=50, seed=2)


def test_more_training_rows_leave_the_test_rows_as_they_are(tmp_path: Path) -> None:
    for num_train in (10, 200):
        write_demo_data(tmp_path / str(num_train), num_train=num_train, num_test=20)
    for task in DEMO_TASKS:
        small, large = (tmp_path / size / task / "test.jsonl" for size in ("10", "200"))
        assert small.read_bytes() == large.read_bytes()


@pytest.mark.parametrize("task", DEMO_TASKS)
def test_inputs_are_short_and_varied(task: str) -> None:
    inputs = [example.input for example in all_examples(task)]
    assert max(len(text.split()) for text in inputs) <= 24
    assert len({text.split()[0].casefold() for text in inputs}) >= 12
    check_name("task", task)


def test_every_intent_is_asked_for_about_equally_often() -> None:
    counts = Counter(example.output for example in all_examples("support-intent"))
    assert set(counts) == set(INTENTS)
    assert min(counts.values()) > 30
    assert max(counts.values()) < 90


def test_orders_are_compact_json_that_says_what_the_text_says() -> None:
    quantities = {"one": 1, "a single": 1, "two": 2, "a couple of": 2, "three": 3, "four": 4, "five": 5}
    for example in all_examples("order-json"):
        order, text = json.loads(example.output), example.input.lower()
        assert example.output == json.dumps(order, separators=(",", ":"))
        assert list(order) == ["drink", "size", "quantity", "to_go"]
        assert order["drink"] in text
        assert order["to_go"] == (re.search(r"to go|take ?away", text) is not None)
        said = [number for words, number in quantities.items() if re.search(rf"\b{words}\b", text)]
        assert [order["quantity"]] == said or str(order["quantity"]) in text
        aliases = {"little": "small", "regular": "medium", "big": "large"}
        assert [size for word, size in (*aliases.items(), *((s, s) for s in aliases.values())) if word in text] == [
            order["size"]
        ]


def test_dates_are_the_real_days_that_the_text_names() -> None:
    for example in all_examples("date-iso"):
        date, text = dt.date.fromisoformat(example.output), example.input.lower()
        assert str(date.year) in text
        assert MONTHS[date.month - 1] in text
        rest = text.replace(str(date.year), "")
        assert re.search(rf"(?<!\d){date.day}(?!\d)", rest) or WORDS[date.day - 1] in rest


def test_an_unknown_task_and_too_many_examples_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="must be one of date-iso"):
        demo_examples("poems", num=1, seed=0)
    with pytest.raises(InvalidInputError, match="fewer different inputs"):
        demo_examples("order-json", num=100_000, seed=0)


def test_reference_prompts_are_many_different_and_never_change() -> None:
    prompts = reference_prompts()
    assert 550 <= len(set(prompts)) == len(prompts) <= 700
    assert all(text.strip() and len(text) < 160 for text in prompts)
    assert hashlib.sha256("\n".join(prompts).encode()).hexdigest() == REFERENCE_SHA256


def test_every_reference_prompt_is_of_a_kind_and_kinds_stand_together() -> None:
    kinds = dict(zip(reference_prompts(), reference_kinds(), strict=True))
    assert list(kinds.values()) == sorted(kinds.values())
    assert set(kinds.values()) == set(range(max(kinds.values()) + 1))
    assert kinds["yes please"] == kinds["are you a robot"] != kinds["yes, at 7 am"]


def test_reference_prompts_share_no_sentence_with_the_demo_tasks() -> None:
    demo = {example.input.casefold() for task in DEMO_TASKS for example in all_examples(task)}
    assert demo.isdisjoint(text.casefold() for text in reference_prompts())
