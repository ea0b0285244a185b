"""Composite instructions: one note, and two or three things to do with it that come from different groups.

It does not know models or training; the rows look like anyone's JSONL.
Read first: the example is a ward's notes, with the groups function, domain and style. Every intent is a task of its
own as well, so that each has its expert; a composite answer is the answers of its intents, in the order asked. All
follows from the seed.
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
_MAX_REPEATS = 20
_NAMES = ("Ada", "Bo", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ida", "Jon")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_STRENGTHS: Mapping[str, str] = MappingProxyType({"mild": "low", "strong": "medium", "unbearable": "high"})
_HEART: Mapping[str, str] = MappingProxyType(
    {"chest pain": "H1", "palpitations": "H2", "a racing pulse": "H3", "swollen ankles": "H4"}
)
_SKIN: Mapping[str, str] = MappingProxyType(
    {"an itching rash": "S1", "blisters": "S2", "a changing mole": "S3", "dry patches": "S4"}
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
    """One thing to do: ways to ask for it, and the right answer."""

    group: str
    asked: tuple[str, ...]
    answer: Callable[[Note], str]


INTENTS: Mapping[str, Intent] = MappingProxyType(
    {
        "urgency": Intent(
            "function",
            ("state the urgency", "how urgent is it", "rate the urgency"),
            lambda note: f"urgency {_STRENGTHS[note.strength]}",
        ),
        "onset": Intent(
            "function",
            ("state the onset", "when did it begin", "name the first day"),
            lambda note: f"onset {note.day[:3]}",
        ),
        "cardiology": Intent(
            "domain",
            ("code the heart finding", "give the cardiology code", "what is the heart code"),
            lambda note: f"code {_HEART[note.heart]}",
        ),
        "dermatology": Intent(
            "domain",
            ("code the skin finding", "give the dermatology code", "what is the skin code"),
            lambda note: f"code {_SKIN[note.skin]}",
        ),
        "formal": Intent(
            "style",
            ("close formally", "end like a letter", "sign off formally"),
            lambda note: f"Yours sincerely, ward of {note.name}",
        ),
        "plain": Intent(
            "style",
            ("close plainly", "end like a friend", "sign off plainly"),
            lambda note: f"Take care, {note.name}!",
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


def composite_examples(*, num: int, seed: int) -> tuple[Example, ...]:
    """Rows with two or three intents out of different groups, no input twice.

    Raises:
        InvalidInputError: so many different rows do not exist.
    """

    def make(rng: random.Random) -> Example:
        groups = rng.sample(tuple(GROUPS), rng.choice((2, 3)))
        return _row(rng, [rng.choice(GROUPS[group]) for group in groups])

    return _distinct(make, num, f"{seed} {COMPOSITE}")


def parts(answer: str) -> list[str]:
    """The answers of the intents in a composite answer."""
    return [part.strip() for part in answer.split(";")]


def write_composite_data(folder: Path, *, num_train: int, num_test: int, seed: int) -> None:
    """Write `<task>/train.jsonl` and `test.jsonl` for every intent and for `composite`."""
    for task in (*INTENTS, COMPOSITE):
        num = num_test + num_train
        rows = (
            composite_examples(num=num, seed=seed) if task == COMPOSITE else intent_examples(task, num=num, seed=seed)
        )
        (folder / task).mkdir(parents=True, exist_ok=True)
        # The test rows come first, so that more training rows leave them as they are.
        for name, part in ((TEST_FILE, rows[:num_test]), (TRAIN_FILE, rows[num_test:])):
            lines = (json.dumps({"input": row.input, "output": row.output}) + "\n" for row in part)
            (folder / task / name).write_text("".join(lines), encoding="utf-8", newline="\n")


def _row(rng: random.Random, tasks: Sequence[str]) -> Example:
    note = Note(
        rng.choice(_NAMES),
        rng.choice(tuple(_STRENGTHS)),
        rng.choice(tuple(_HEART)),
        rng.choice(tuple(_SKIN)),
        rng.choice(_DAYS),
    )
    asked = ", ".join(rng.choice(INTENTS[task].asked) for task in tasks)
    answer = "; ".join(INTENTS[task].answer(note) for task in tasks)
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
