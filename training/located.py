"""Answers when nobody names the task: who answers each prompt is what a locator decides.

It does not know how experts are trained or stages are kept.
Read first: `relocate` puts a locator that is fitted now in the place of the one that was stored with the experts, so
that a better locator can be measured without training anything again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from training.answer_book import AnswerBook
from training.config import TrainingConfig
from training.contenders import Contender, GrowingContender, contender
from training.relocation import Relocation
from training.score import exact_match
from training.subject import Subject

NOBODY = "none"
"""How a record writes that no task was located."""

Record = dict[str, Any]
"""What is kept of one stage; keys as in `training.contest`."""


def located_answers(
    book: AnswerBook,
    learner: Contender,
    locator: GrowingContender | Relocation,
    seen: Sequence[tuple[Subject, str]],
    strangers: Mapping[str, Sequence[Sequence[int]]],
) -> Record:
    """Answer each prompt by the task where it is located, or by the base alone.

    Args:
        book: keeps answers.
        learner: answers, as of the stage in question.
        locator: of the same stage.
        seen: tasks, each with what the book calls the learner's mixture for it.
        strangers: prompts of tasks that nobody learns, by task.

    Returns:
        the keys `located` (score per task), `decisions` and `strangers` (task -> located task -> prompts).
    """
    who = {subject.name: name for subject, name in seen}
    scores, decisions = [], {}
    for subject, _ in seen:
        tasks = locator.locate(subject.prompts)
        answers = [""] * len(tasks)
        for task in sorted(set(tasks), key=str):
            at = [i for i, located in enumerate(tasks) if located == task]
            answerer = book.identify({}, subject) if task is None else who[task]
            given = book.answers(answerer, {} if task is None else learner.ffns(task), subject, at)
            for i, answer in zip(at, given, strict=True):
                answers[i] = answer
        scores.append(score_of(subject, answers))
        decisions[subject.name] = Counter(task or NOBODY for task in tasks)
    others = {name: Counter(task or NOBODY for task in locator.locate(prompts)) for name, prompts in strangers.items()}
    return {"located": scores, "decisions": decisions, "strangers": others}


def relocate(
    book: AnswerBook,
    records: Mapping[str, Sequence[Record]],
    *,
    subjects: Sequence[Subject],
    strangers: Mapping[str, Sequence[Sequence[int]]],
    folder: Path,
    config: TrainingConfig,
) -> None:
    """Put what a locator that is fitted now decides into the records of all contenders that locate; no file changes.

    Args:
        book: keeps answers.
        records: contender -> its records, one per stage; changed in place.
        subjects: all tasks, in the order of their arrival.
        strangers: prompts of tasks that nobody learns, by task.
        folder: of the contenders' own folders.
        config: that of the run, with its `first_layer`; its fields `locator_*` may be others than those of the experts.
    """
    first_layer = config.first_layer or 0
    growing = {name: stages for name, stages in records.items() if "located" in stages[-1]}
    with TemporaryDirectory() as scratch:
        locator = Relocation(book.base, Path(scratch), config=config)
        learners = {
            name: contender(name, book.base, folder / name, first_layer=first_layer, config=config) for name in growing
        }
        for stage, subject in enumerate(subjects):
            locator.learn(stage, subject)
            for name, stages in growing.items():
                learners[name].learn(stage, subject)
                record = stages[stage]
                seen = [(found, record["fingerprints"][found.name]) for found in subjects[: stage + 1]]
                others = strangers if stage == len(subjects) - 1 else {}  # figures are of the last stage
                record |= located_answers(book, learners[name], locator, seen, others)
                record["parameters_locating"] = record["parameters"] + locator.num_parameters


def score_of(subject: Subject, answers: Sequence[str]) -> float:
    """Share of exact answers."""
    return exact_match(answers, [question.expected for question in subject.questions])
