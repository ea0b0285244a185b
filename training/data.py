"""Task data: rows of input and output text, read from folders of JSONL or from a dataset hub.

It does not know tokens, templates or models.
Read first: a task folder is `<name>/train.jsonl` and `<name>/test.jsonl` with one JSON object per line that has the
strings `input` and `output`, and may have `learned`; its folder name is the task's name.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

from runtime.errors import DataError, InvalidInputError
from runtime.model.names import check_name

TRAIN_FILE = "train.jsonl"
TEST_FILE = "test.jsonl"


@dataclass(frozen=True)
class Example:
    """One input and the answer to learn; neither is empty.

    Args:
        input: what is asked.
        output: what is to be answered.
        learned: the piece of `output` that a training learns; what stands before it is given, what stands after it is
            left out. None is all of it. Means nothing where answers are judged.
        source: the file or dataset that it was read from; "" for none.
        line: its line there, from 1.
    """

    input: str
    output: str
    learned: str | None = None
    source: str = dataclass_field(default="", compare=False)
    line: int = dataclass_field(default=0, compare=False)


@dataclass(frozen=True)
class TaskData:
    """Everything a task is trained and judged on; neither part is empty."""

    name: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]


def read_examples(path: Path) -> list[Example]:
    """Read one JSONL file; blank lines are skipped and fields that `Example` does not have ignored.

    Raises:
        DataError: the file is missing, not UTF-8 or has no rows, or a line is not JSON, lacks a field, or has one that
            is not a string or holds nothing but blanks; it names file, line, field and value.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise DataError(str(path), 0, "there is no such file") from error
    except UnicodeDecodeError as error:
        raise DataError(str(path), 0, f"is not UTF-8: {error}") from error
    examples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(str(path), number, f"is not JSON: {error}") from error
        examples.append(_example(row, str(path), number))
    if not examples:
        raise DataError(str(path), 0, "holds no rows")
    return examples


def read_task_folder(folder: Path) -> TaskData:
    """Read `train.jsonl` and `test.jsonl` of one task.

    Raises:
        InvalidInputError: the folder's name is not a valid task name.
        DataError: as for `read_examples`.
    """
    name = check_name("task", folder.resolve().name)
    return TaskData(name, tuple(read_examples(folder / TRAIN_FILE)), tuple(read_examples(folder / TEST_FILE)))


def read_tasks(folder: Path) -> tuple[TaskData, ...]:
    """Read all task folders inside `folder`, in name order; a folder that is itself a task folder counts as one task.

    Folders inside it without `train.jsonl` are passed over.

    Raises:
        DataError: there is no task in it; or as for `read_examples`.
        InvalidInputError: as for `read_task_folder`.
    """
    if (folder / TRAIN_FILE).is_file():
        return (read_task_folder(folder),)
    found = sorted(path.parent for path in folder.glob(f"*/{TRAIN_FILE}"))
    if not found:
        raise DataError(str(folder), 0, f"no task in it: expected <task>/{TRAIN_FILE} and <task>/{TEST_FILE}")
    return tuple(read_task_folder(path) for path in found)


def load_hub_dataset(
    dataset_id: str,
    *,
    train_split: str = "train",
    test_split: str = "test",
    input_field: str = "input",
    output_field: str = "output",
    load: Callable[..., Iterable[Any]] | None = None,
) -> TaskData:
    """Read one task from a dataset hub, or from a folder that the `datasets` library understands.

    Args:
        dataset_id: as the hub writes it, "owner/name"; the lower-cased name becomes the task's name.
        train_split: split to train on.
        test_split: split to judge on.
        input_field: column with the input text.
        output_field: column with the answer.
        load: stands in for `datasets.load_dataset`; None imports it.

    Raises:
        InvalidInputError: the optional library is not installed, or the id makes no task name.
        DataError: a split is empty or a row is unusable.
    """
    name = check_name("task", dataset_id.rsplit("/", 1)[-1].lower())
    if load is None:
        try:
            load = importlib.import_module("datasets").load_dataset
        except ImportError as error:
            raise InvalidInputError(
                "data", dataset_id, "reading a dataset hub needs the extra `hub`: pip install 'greenroom[hub]'"
            ) from error
    parts = []
    for split in (train_split, test_split):
        source = f"{dataset_id}[{split}]"
        rows = enumerate(load(dataset_id, split=split), start=1)
        part = tuple(_example(row, source, number, input_field, output_field) for number, row in rows)
        if not part:
            raise DataError(source, 0, "holds no rows")
        parts.append(part)
    return TaskData(name, *parts)


def _example(
    row: object, source: str, number: int, input_field: str = "input", output_field: str = "output"
) -> Example:
    if not isinstance(row, dict):
        raise DataError(source, number, f"must be a JSON object, not {_short(row)}")
    texts = []
    for field in (input_field, output_field):
        if field not in row:
            raise DataError(source, number, f"field {field!r} is missing")
        value = row[field]
        if not isinstance(value, str):
            raise DataError(source, number, f"{field}={_short(value)}: must be a string")
        if not value.strip():
            raise DataError(source, number, f"{field}={_short(value)}: must not be empty")
        texts.append(value)
    learned = row.get("learned")
    if learned is not None and (not isinstance(learned, str) or not learned.strip()):
        raise DataError(source, number, f"learned={_short(learned)}: must be a piece of {output_field}")
    return Example(texts[0], texts[1], learned, source=source, line=number)


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
