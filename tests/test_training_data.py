"""What reading task data promises: rows as they are, and for each bad row one error with file, line, field and value.

It does not know what a task is trained for.
Read first: the hub is stood in for by a function, since the library for it is optional.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from runtime.errors import DataError, InvalidInputError
from training.data import Example, TaskData, load_hub_dataset, read_examples, read_task_folder, read_tasks

GOOD = '{"input": "in", "output": "out"}'


def write_task(folder: Path, *, train: str = GOOD, test: str = GOOD) -> Path:
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(train, encoding="utf-8")
    (folder / "test.jsonl").write_text(test, encoding="utf-8")
    return folder


def read_text(tmp_path: Path, text: str) -> list[Example]:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    return read_examples(path)


def test_rows_are_read_in_order_and_other_fields_are_ignored(tmp_path: Path) -> None:
    text = f'{GOOD}\n\n{{"input": " ä\\u2028 ", "output": "{{}}", "id": 7, "source": null}}\r\n'
    assert read_text(tmp_path, text) == [Example("in", "out"), Example(" ä\u2028 ", "{}")]


def test_a_row_may_say_which_piece_of_its_output_is_learned(tmp_path: Path) -> None:
    text = '{"input": "in", "output": "a; b", "learned": " b"}\n{"input": "in", "output": "a; b", "learned": null}'
    assert [row.learned for row in read_text(tmp_path, text)] == [" b", None]


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path) -> None:
    row = json.dumps({"input": "a\u2028b\x0bc", "output": "x"}, ensure_ascii=False)
    assert read_text(tmp_path, row) == [Example("a\u2028b\x0bc", "x")]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "is not JSON"),
        ("[1]", r"must be a JSON object, not \[1\]"),
        ('{"output": "x"}', "field 'input' is missing"),
        ('{"input": "x"}', "field 'output' is missing"),
        ('{"input": 3, "output": "x"}', "input=3: must be a string"),
        ('{"input": "x", "output": null}', "output=None: must be a string"),
        ('{"input": "", "output": "x"}', "input='': must not be empty"),
        ('{"input": "x", "output": " \\t"}', r"output=' \\t': must not be empty"),
        ('{"input": "x", "output": "y", "learned": 3}', "learned=3: must be a piece of output"),
        ('{"input": "x", "output": "y", "learned": " "}', "learned=' ': must be a piece of output"),
    ],
)
def test_a_bad_row_is_an_error_with_file_line_field_and_value(tmp_path: Path, row: str, problem: str) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: {problem}") as caught:
        read_text(tmp_path, f"{GOOD}\n\n{row}\n{GOOD}")
    assert caught.value.line == 3


def test_a_long_value_is_shortened_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_text(tmp_path, json.dumps({"input": ["x" * 1000], "output": "y"}))
    assert len(caught.value.problem) < 120


def test_a_file_that_is_missing_empty_or_not_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no rows"):
        read_text(tmp_path, "\n \n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        read_examples(tmp_path / "binary.jsonl")


def test_a_task_folder_is_named_by_its_folder(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "clinc_banking")
    row = (Example("in", "out"),)
    assert read_task_folder(folder) == TaskData("clinc_banking", row, row)


def test_a_folder_with_a_bad_name_is_no_task(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="My Task"):
        read_task_folder(write_task(tmp_path / "My Task"))


def test_a_task_without_test_rows_is_an_error(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "task")
    (folder / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"test\.jsonl: there is no such file"):
        read_task_folder(folder)


def test_tasks_come_in_name_order_and_other_folders_are_passed_over(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write_task(tmp_path / name)
    (tmp_path / "notes").mkdir()
    assert [task.name for task in read_tasks(tmp_path)] == ["a", "b", "c"]


def test_a_task_folder_by_itself_counts_as_one_task(tmp_path: Path) -> None:
    assert [task.name for task in read_tasks(write_task(tmp_path / "alone"))] == ["alone"]


def test_a_folder_without_tasks_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected <task>/train\.jsonl"):
        read_tasks(tmp_path)


def fake_load(dataset_id: str, *, split: str) -> list[dict[str, object]]:
    assert dataset_id == "someone/My-Set"
    return {"train": [{"q": "1", "a": "2"}], "validation": [{"q": "3", "a": "4"}], "empty": [], "bad": [{"q": 1}]}[
        split
    ]


def load_fake(test_split: str) -> TaskData:
    return load_hub_dataset("someone/My-Set", test_split=test_split, input_field="q", output_field="a", load=fake_load)


def test_a_hub_dataset_becomes_a_task_with_the_named_columns_and_splits() -> None:
    assert load_fake("validation") == TaskData("my-set", (Example("1", "2"),), (Example("3", "4"),))


def test_a_hub_split_that_is_empty_or_bad_is_named() -> None:
    with pytest.raises(DataError, match=r"someone/My-Set\[empty\]: holds no rows"):
        load_fake("empty")
    with pytest.raises(DataError, match=r"someone/My-Set\[bad\]:1: q=1: must be a string"):
        load_fake("bad")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="the optional library is installed")
def test_without_the_hub_library_the_error_names_the_extra() -> None:
    with pytest.raises(InvalidInputError, match=r"greenroom\[hub\]"):
        load_hub_dataset("someone/my-set")
