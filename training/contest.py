"""A comparison on one sequence of tasks: every contender learns one after the other and answers for all it has seen.

It does not know how contenders learn, nor how results are shown.
Read first: the result of every (contender, stage) is kept as one JSON file; a run that finds it there takes it from
there. All contenders get the same rows, steps and rates.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from runtime.errors import InvalidInputError
from runtime.model.attach import MixtureFFN
from runtime.model.base import BaseModel
from training.answer_book import AnswerBook, write_json
from training.config import TrainingConfig
from training.contenders import GROWING, SHARED, Contender, GrowingContender, contender
from training.located import Record, located_answers, relocate, score_of
from training.subject import Subject, read_strangers, read_subject

CONTENDERS = ("zero_shot", *SHARED, *GROWING)

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
        relocate: fit the locator anew for tasks whose experts are trained; nothing else is computed again.
    """

    data: Path
    tasks: tuple[str, ...]
    strangers: tuple[str, ...]
    contenders: tuple[str, ...]
    train_rows: int
    test_rows: int
    first_layer: int
    relocate: bool = False


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
    _claim(folder / "settings.json", _settings(base, contest, config), relocating=contest.relocate)
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
    if contest.relocate:
        placed = replace(config, first_layer=contest.first_layer)
        relocate(book, records, subjects=subjects, strangers=strangers, folder=folder, config=placed)
    return records


def _stage(
    book: AnswerBook,
    learner: Contender | None,
    seen: Sequence[Subject],
    strangers: Mapping[str, Sequence[Sequence[int]]],
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
        "given": [score_of(subject, book.answers(who[subject.name], ffns[subject.name], subject)) for subject in seen],
        "parameters": 0 if learner is None else learner.num_parameters(locating=False),
    }
    if isinstance(learner, GrowingContender):
        record |= located_answers(book, learner, learner, [(subject, who[subject.name]) for subject in seen], strangers)
        record["parameters_locating"] = learner.num_parameters(locating=True)
    return record | {"learn_s": round(learned - started, 2), "score_s": round(time.monotonic() - learned, 2)}


def _settings(base: BaseModel, contest: Contest, config: TrainingConfig) -> Record:
    """What makes results comparable; contenders may be added later, and the folder of the data may move."""
    described = {"base": base.info.digest, "dtype": str(base.model.dtype), **asdict(config), **asdict(contest)}
    del described["data"], described["contenders"], described["relocate"]
    loaded: Record = json.loads(json.dumps(described))
    return loaded


def _claim(path: Path, settings: Record, *, relocating: bool) -> None:
    if not path.exists():
        write_json(path, settings)
    kept = json.loads(path.read_text(encoding="utf-8"))
    other = sorted(key for key in kept.keys() | settings.keys() if kept.get(key) != settings.get(key))
    if relocating:
        other = [key for key in other if not key.startswith("locator_")]
    if other:
        raise InvalidInputError("work", str(path.parent), f"was made with another {', '.join(other)}")
