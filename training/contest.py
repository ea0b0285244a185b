"""A comparison on one sequence of tasks: every contender learns one after the other and answers for all it has seen.

It does not know how contenders learn, nor how results are shown.
Read first: the result of every (contender, stage) is kept as one JSON file; a run that finds it there takes it from
there. All contenders get the same rows, steps and rates.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.errors import InvalidInputError
from runtime.model.attach import MixtureFFN
from runtime.model.base import BaseModel
from training.answer_book import AnswerBook, write_json
from training.config import TrainingConfig
from training.contenders import GROWING, SHARED, Contender, contender
from training.score import exact_match
from training.subject import Subject, read_strangers, read_subject

CONTENDERS = ("zero_shot", *SHARED, *GROWING)
NOBODY = "none"
"""How a record writes that no task was located."""

Record = dict[str, Any]
"""What is kept of one stage; keys as in `_stage`."""

OnStage = Callable[[int, str, int, Record], None]
"""Called with (seed, contender, stage, its record) when a stage is done or was found done."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """What is compared on what.

    Args:
        data: folder of task folders.
        tasks: in the order of their arrival.
        strangers: tasks that nobody learns; the locator should refuse their prompts.
        contenders: members of `CONTENDERS`.
        train_rows: rows to learn per task, at most.
        test_rows: questions per task, at most.
        first_layer: lowest layer with experts, for all contenders.
    """

    data: Path
    tasks: tuple[str, ...]
    strangers: tuple[str, ...]
    contenders: tuple[str, ...]
    train_rows: int
    test_rows: int
    first_layer: int


def run_contest(
    base: BaseModel, contest: Contest, config: TrainingConfig, work: Path, *, on_stage: OnStage
) -> dict[str, list[Record]]:
    """Run, or finish, the comparison for one seed.

    Args:
        base: frozen.
        contest: what is compared.
        config: how all of them train; its seed is the one.
        work: folder for what is kept; belongs to these settings alone.
        on_stage: see `OnStage`.

    Returns:
        contender -> its records, one per stage.

    Raises:
        InvalidInputError: `work` was made with other settings.
        DataError: a task cannot be read.
    """
    folder = work / f"seed{config.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder / "settings.json", _settings(base, contest, config))
    sizes = {"train_rows": contest.train_rows, "test_rows": contest.test_rows}
    subjects = [read_subject(base, contest.data / name, config=config, **sizes) for name in contest.tasks]
    strangers = read_strangers(base, contest.data, contest.strangers, test_rows=contest.test_rows)
    book = AnswerBook(base, work / "answers")
    records: dict[str, list[Record]] = {}
    for name in contest.contenders:
        place = folder / name
        place.mkdir(exist_ok=True)
        learner = None
        if name != "zero_shot":
            learner = contender(name, base, place, first_layer=contest.first_layer, config=config)
        records[name] = []
        for stage in range(len(subjects)):
            path = place / f"stage-{stage}.json"
            if not path.exists():
                before = records[name][-1]["fingerprints"] if records[name] else {}
                write_json(path, _stage(book, learner, subjects[: stage + 1], strangers, before))
            records[name].append(json.loads(path.read_text(encoding="utf-8")))
            on_stage(config.seed, name, stage, records[name][-1])
    return records


def _stage(
    book: AnswerBook,
    learner: Contender | None,
    seen: Sequence[Subject],
    strangers: Sequence[Sequence[int]],
    before: Mapping[str, str],
) -> Record:
    """Learn the last of `seen`, then ask for all of them."""
    started = time.monotonic()
    if learner is not None:
        learner.learn(len(seen) - 1, seen[-1])
    learned = time.monotonic()
    ffns: dict[str, Mapping[int, MixtureFFN]] = {
        subject.name: {} if learner is None else learner.ffns(subject.name) for subject in seen
    }
    who = {subject.name: book.identify(ffns[subject.name], subject) for subject in seen}
    record: Record = {
        "fingerprints": who,
        "moved": [name for name, known in before.items() if who[name] != known],
        "promises": learner is None or learner.promises,
        "given": [_score(subject, book.answers(who[subject.name], ffns[subject.name], subject)) for subject in seen],
        "parameters": 0 if learner is None else learner.num_parameters(locating=False),
    }
    if learner is not None and learner.locate(seen[0].prompts[:1]) is not None:
        record |= _located(book, learner, seen, who, ffns)
        record["strangers"] = Counter(task or NOBODY for task in learner.locate(strangers) or ()) if strangers else {}
        record["parameters_locating"] = learner.num_parameters(locating=True)
    return record | {"learn_s": round(learned - started, 2), "score_s": round(time.monotonic() - learned, 2)}


def _located(
    book: AnswerBook,
    learner: Contender,
    seen: Sequence[Subject],
    who: Mapping[str, str],
    ffns: Mapping[str, Mapping[int, MixtureFFN]],
) -> Record:
    """Answers when nobody names the task: each prompt by the task where it is located, or by the base alone."""
    scores, decisions = [], {}
    for subject in seen:
        tasks = learner.locate(subject.prompts) or []
        answers = [""] * len(tasks)
        for task in sorted(set(tasks), key=str):
            at = [i for i, located in enumerate(tasks) if located == task]
            answerer = book.identify({}, subject) if task is None else who[task]
            given = book.answers(answerer, {} if task is None else ffns[task], subject, at)
            for i, answer in zip(at, given, strict=True):
                answers[i] = answer
        scores.append(_score(subject, answers))
        decisions[subject.name] = Counter(task or NOBODY for task in tasks)
    return {"located": scores, "decisions": decisions}


def _score(subject: Subject, answers: Sequence[str]) -> float:
    return exact_match(answers, [question.expected for question in subject.questions])


def _settings(base: BaseModel, contest: Contest, config: TrainingConfig) -> Record:
    """What makes results comparable; contenders may be added later, and the folder of the data may move."""
    described = {"base": base.info.digest, "dtype": str(base.model.dtype), **asdict(config), **asdict(contest)}
    del described["data"], described["contenders"]
    loaded: Record = json.loads(json.dumps(described))
    return loaded


def _claim(path: Path, settings: Record) -> None:
    if not path.exists():
        write_json(path, settings)
    kept = json.loads(path.read_text(encoding="utf-8"))
    other = sorted(key for key in kept.keys() | settings.keys() if kept.get(key) != settings.get(key))
    if other:
        raise InvalidInputError("work", str(path.parent), f"was made with another {', '.join(other)}")
