"""What a comparison of methods runs on: of every task, the rows to learn and the questions to answer.

It does not know methods or scores.
Read first: rows to learn are drawn anew for every seed; questions are the same for all seeds and all methods.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import InvalidInputError
from runtime.model.base import BaseModel
from runtime.model.prompt import default_template
from training.answers import Question, question
from training.batches import Row, encode_example
from training.config import TrainingConfig
from training.data import TEST_FILE, Example, TaskData, read_examples, read_task_folder
from training.seeds import seed_for


@dataclass(frozen=True)
class Subject:
    """One task: `data.train` as `rows`, `data.test` as `questions`."""

    data: TaskData
    rows: tuple[Row, ...]
    questions: tuple[Question, ...]

    @property
    def name(self) -> str:
        """The task's name."""
        return self.data.name

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """Token ids of the prompts of all questions."""
        return [question.prompt for question in self.questions]


def read_subject(base: BaseModel, folder: Path, *, train_rows: int, test_rows: int, config: TrainingConfig) -> Subject:
    """Draw and tokenise one task's rows.

    Args:
        base: its tokenizer and default template make the prompts.
        folder: of the task; its name is the task's.
        train_rows: at most so many rows to learn.
        test_rows: at most so many questions.
        config: seed, and the bound on the length of a row.

    Raises:
        DataError, InvalidInputError: as for `read_task_folder`; or a row is too long.
    """
    found = read_task_folder(folder)
    data = TaskData(
        found.name,
        _drawn(found.train, train_rows, seed_for(config.seed, found.name, "rows")),
        _drawn(found.test, test_rows, seed_for(0, found.name, "questions")),
    )
    template = default_template(base)
    rows = [encode_example(base, template, row, max_tokens=config.max_tokens) for row in data.train]
    asked = [question(base, template.encode(base.tokenizer, row.input), row) for row in data.test]
    return Subject(data, tuple(rows), tuple(asked))


def read_strangers(
    base: BaseModel, folder: Path, names: Sequence[str], *, test_rows: int
) -> dict[str, list[list[int]]]:
    """Prompts of tasks that nobody learns, at most `test_rows` of each; task -> token ids."""
    template = default_template(base)
    return {
        name: [
            template.encode(base.tokenizer, row.input)
            for row in _drawn(
                tuple(read_examples(folder / name / TEST_FILE)), test_rows, seed_for(0, name, "questions")
            )
        ]
        for name in names
    }


def other_tasks(folder: Path, tasks: Sequence[str]) -> tuple[str, ...]:
    """Names of the tasks in `folder` besides `tasks`."""
    return tuple(sorted(path.parent.name for path in folder.glob(f"*/{TEST_FILE}") if path.parent.name not in tasks))


def check_tasks(folder: Path, field: str, names: Sequence[str]) -> None:
    """Check that every name is a task of `folder`, and none occurs twice.

    Raises:
        InvalidInputError: not so; it names `field` and the task.
    """
    for name in names:
        if not (folder / name / TEST_FILE).is_file():
            raise InvalidInputError(field, name, f"the data hold {', '.join(other_tasks(folder, ()))}")
    if len(set(names)) < len(names):
        raise InvalidInputError(field, list(names), "must name every task once")


def _drawn(rows: tuple[Example, ...], limit: int, seed: int) -> tuple[Example, ...]:
    """At most `limit` rows, in the order in which they lie."""
    chosen = random.Random(seed).sample(range(len(rows)), min(limit, len(rows)))  # noqa: S311 - a draw is no secret
    return tuple(rows[i] for i in sorted(chosen))
