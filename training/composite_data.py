"""Composite instructions: one note, and two or three things to do with it that come from different groups.

It does not know models or training; the rows look like anyone's JSONL.
Read first: the example is a ward's notes, with the groups function, domain and style. Every intent is a task of its
own as well, so that each has its expert: two of three of its rows ask for other things too, and only its own part of
the answer is learned, so that an expert knows its part among others, but no other part. A composite answer is the
answers of its intents, in the order asked. Two pairs of intents never meet in any row that trains experts or routers;
questions in which one does are the unseen combinations. All follows from the seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from runtime.errors import InvalidInputError
from training.data import TEST_FILE, TRAIN_FILE, Example

COMPOSITE = "composite"
UNSEEN_FILE = "unseen.jsonl"
APART = (("onset", "cardiology"), ("dermatology", "plain"))
"""Pairs of intents that no training row has together."""
_SEPARATOR = ";"
_MAX_REPEATS = 20
_NAMES = ("Ada", "Bo", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ida", "Jon")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_STRENGTHS: Mapping[str, str] = MappingProxyType({"mild": "low", "strong": "medium", "unbearable": "high"})
_HEART: Mapping[str, str] = MappingProxyType(
    {"chest pain": "1", "palpitations": "2", "a racing pulse": "3", "swollen ankles": "4"}
)
_SKIN: Mapping[str, str] = MappingProxyType(
    {"an itching rash": "1", "blisters": "2", "a changing mole": "3", "dry patches": "4"}
)


@dataclass(frozen=True)
class Note:
    """What stands in a note."""

    name: str
    strength: str
    heart: str
    skin: str
    day: str

    def text(self) -> str:
        """The note as it is written."""
        return f"{self.name} has {self.strength} {self.heart} and {self.skin} since {self.day}."


@dataclass(frozen=True)
class Intent:
    """One thing to do: ways to ask for it, and the right answer, which begins as that of no other intent does."""

    group: str
    asked: tuple[str, ...]
    begins: str
    goes_on: Callable[[Note], str]

    def answer(self, note: Note) -> str:
        """The right answer."""
        return self.begins + self.goes_on(note)


INTENTS: Mapping[str, Intent] = MappingProxyType(
    {
        "urgency": Intent(
            "function",
            ("state the urgency", "how urgent is it", "rate the urgency"),
            "urgency ",
            lambda note: _STRENGTHS[note.strength],
        ),
        "onset": Intent(
            "function",
            ("state the onset", "when did it begin", "name the first day"),
            "onset ",
            lambda note: note.day[:3],
        ),
        "cardiology": Intent(
            "domain",
            ("code the heart finding", "give the cardiology code", "what is the heart code"),
            "code H",
            lambda note: _HEART[note.heart],
        ),
        "dermatology": Intent(
            "domain",
            ("code the skin finding", "give the dermatology code", "what is the skin code"),
            "code S",
            lambda note: _SKIN[note.skin],
        ),
        "formal": Intent(
            "style",
            ("close formally", "end like a letter", "sign off formally"),
            "Yours sincerely, ",
            lambda note: f"ward of {note.name}",
        ),
        "plain": Intent(
            "style",
            ("close plainly", "end like a friend", "sign off plainly"),
            "Take care, ",
            lambda note: f"{note.name}!",
        ),
    }
)
"""Task -> what it is; the order is that in which tasks are trained."""

GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        group: tuple(task for task, intent in INTENTS.items() if intent.group == group)
        for group in ("function", "domain", "style")
    }
)


def intent_examples(task: str, *, num: int, seed: int) -> tuple[Example, ...]:
    """Rows of one intent alone, no input twice.

    Raises:
        InvalidInputError: no such intent, or so many different rows do not exist.
    """
    if task not in INTENTS:
        raise InvalidInputError("task", task, f"must be one of {', '.join(INTENTS)}")
    return _distinct(lambda rng: _row(rng, [task]), num, f"{seed} {task}")


def shared_examples(task: str, *, num: int, seed: int) -> tuple[Example, ...]:
    """Rows with `task` and one or two intents of other groups, no input twice; only the part of `task` is learned.

    Of pairs that are `APART` none is among them. The part comes with what follows it, the separator or the end.

    Raises:
        InvalidInputError: so many different rows do not exist.
    """

    def make(rng: random.Random) -> Example:
        tasks = _combination(rng, unseen=False, member=task)
        return pieces(_row(rng, tasks))[task]

    return _distinct(make, num, f"{seed} {task} {COMPOSITE}")


def composite_examples(*, num: int, seed: int, unseen: bool = False) -> tuple[Example, ...]:
    """Rows with two or three intents out of different groups, no input twice.

    Args:
        num: how many.
        seed: of all that is drawn.
        unseen: whether a pair of intents that are `APART` is in every row, or in none.

    Raises:
        InvalidInputError: so many different rows do not exist.
    """
    return _distinct(
        lambda rng: _row(rng, _combination(rng, unseen=unseen)), num, f"{seed} {COMPOSITE}{' unseen' * unseen}"
    )


def parts(answer: str) -> list[str]:
    """The answers of the intents in a composite answer."""
    return [part.strip() for part in answer.split(_SEPARATOR)]


def pieces(row: Example) -> dict[str, Example]:
    """The row once per intent that it asks for, of which only the intent's part is learned, with what ends that."""
    found, answers = {}, parts(row.output)
    for place, part in enumerate(answers):
        task = next(task for task, intent in INTENTS.items() if part.startswith(intent.begins))
        learned = f"{' ' * (place > 0)}{part}{_SEPARATOR * (place < len(answers) - 1)}"
        found[task] = Example(row.input, row.output, learned)
    return found


def write_composite_data(folder: Path, *, num_train: int, num_test: int, seed: int) -> None:
    """Write `<task>/train.jsonl` and `test.jsonl` for every intent and for `composite`, and `composite/unseen.jsonl`.

    A third of an intent's training rows ask for it alone, as all its test rows do. No composite question is the input
    of any row that trains.

    Raises:
        InvalidInputError: so many different rows do not exist.
    """
    # The questions come first, so that more training rows leave them as they are.
    rows = composite_examples(num=num_test + num_train, seed=seed)
    asked = {row.input for row in rows[:num_test]}
    _write(folder / COMPOSITE / TEST_FILE, rows[:num_test])
    _write(folder / COMPOSITE / TRAIN_FILE, rows[num_test:])
    _write(folder / COMPOSITE / UNSEEN_FILE, composite_examples(num=num_test, seed=seed, unseen=True))
    for task in INTENTS:
        num_shared = num_train - num_train // 3
        alone = intent_examples(task, num=num_test + num_train // 3, seed=seed)
        shared = [row for row in shared_examples(task, num=num_shared, seed=seed) if row.input not in asked]
        _write(folder / task / TEST_FILE, alone[:num_test])
        _write(folder / task / TRAIN_FILE, [*alone[num_test:], *shared])


def _write(path: Path, rows: Sequence[Example]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows:
        fields = {"input": row.input, "output": row.output} | ({"learned": row.learned} if row.learned else {})
        lines.append(json.dumps(fields) + "\n")
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def _combination(rng: random.Random, *, unseen: bool, member: str | None = None) -> list[str]:
    """Two or three intents of different groups, in the order asked; `member` is one of them."""
    while True:
        groups = rng.sample(tuple(GROUPS), rng.choice((2, 3)))
        tasks = [rng.choice(GROUPS[group]) for group in groups]
        if (member is None or member in tasks) and unseen == any(set(pair) <= set(tasks) for pair in APART):
            return tasks


def _row(rng: random.Random, tasks: Sequence[str]) -> Example:
    note = Note(
        rng.choice(_NAMES),
        rng.choice(tuple(_STRENGTHS)),
        rng.choice(tuple(_HEART)),
        rng.choice(tuple(_SKIN)),
        rng.choice(_DAYS),
    )
    asked = ", ".join(rng.choice(INTENTS[task].asked) for task in tasks)
    answer = f"{_SEPARATOR} ".join(INTENTS[task].answer(note) for task in tasks)
    return Example(f"{note.text()} {asked[0].upper()}{asked[1:]}.", answer)


def _distinct(make: Callable[[random.Random], Example], num: int, seed: str) -> tuple[Example, ...]:
    rng = random.Random(seed)  # noqa: S311 - rows of a made-up ward are no secret
    rows: dict[str, Example] = {}
    repeats = 0
    while len(rows) < num:
        row = make(rng)
        repeats = repeats + 1 if row.input in rows else 0
        if repeats > _MAX_REPEATS:
            raise InvalidInputError("num", num, f"only about {len(rows)} different rows can be made")
        rows[row.input] = row
    return tuple(rows.values())
