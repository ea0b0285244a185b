"""Rows: what one holds on its way in, what is known of it on its way, and why one is left out.

It knows nothing of files or engines; everything here can be sent to another process.
Read first: a row is known by its line, which counts from 1 as the source's format counts. A `Prompt` is all that an
engine needs of a row; what the row carries besides stays where the row was read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from runtime.engine.request import SamplingParams
from runtime.errors import GreenroomError, InvalidInputError, UnknownTaskError

Content = dict[str, Any]
How = Literal["located", "pinned", "abstained", "base", "defaulted", "weighted"]
ADDED_FIELDS = ("answer", "routing", "usage")
LOCATE_ROWS = 256
"""Rows located together."""
SHARD_ROWS = 512
"""Rows answered together, unless somebody says otherwise."""
_TYPES = (("input", str, True), ("task", str, False), ("max_tokens", int, False))


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row that is left out.

    Args:
        line: where it stands.
        field: which field is wrong; empty where no single one is.
        reason: stable, as in `runtime.errors`.
        problem: for people.
    """

    line: int
    field: str
    reason: str
    problem: str

    @classmethod
    def of(cls, line: int, error: GreenroomError) -> BadRow:
        """What an error says of a row."""
        field = error.field if isinstance(error, InvalidInputError) else ""
        if isinstance(error, UnknownTaskError):
            field = "task"
        return cls(line=line, field=field, reason=error.reason, problem=str(error))


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What an engine needs of a row.

    Args:
        line: where the row stands.
        text: the input.
        task: pinned by the row, or located; None where neither.
        base_only: it is known that no task answers.
        sampling: how to answer; it has a seed unless it is greedy.
    """

    line: int
    text: str
    task: str | None
    base_only: bool = False
    sampling: SamplingParams


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where the first pass put a row; `bad` where it cannot be answered at all."""

    line: int
    task: str | None
    how: How
    margin: float
    bad: BadRow | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the second pass made of a row; `bad` where that failed."""

    line: int
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = ""
    bad: BadRow | None = None


def prompt_of(line: int, content: Content, sampling: Mapping[str, Any]) -> Prompt:
    """Check a row and take out of it what an engine needs.

    Args:
        line: where it stands.
        content: its fields; `input`, and optionally `task` and `max_tokens`, are ours, others are carried.
        sampling: fields of `SamplingParams` for rows that do not say otherwise.

    Raises:
        InvalidInputError: a field has the wrong type or value, or a name that the answer would overwrite.
    """
    for name, kind, required in _TYPES:
        value = content.get(name)
        if (value is not None or required) and (not isinstance(value, kind) or isinstance(value, bool)):
            raise InvalidInputError(name, value, f"must be {'text' if kind is str else 'a whole number'}")
    for name in ADDED_FIELDS:
        if name in content:
            raise InvalidInputError(name, content[name], "would be overwritten by the answer; rename it")
    if not content["input"]:
        raise InvalidInputError("input", content["input"], "must not be empty")
    own = {} if content.get("max_tokens") is None else {"max_tokens": content["max_tokens"]}
    return make_prompt(line, content["input"], content.get("task"), {**sampling, **own})


def make_prompt(line: int, text: str, task: str | None, sampling: Mapping[str, Any]) -> Prompt:
    """A prompt whose sampling can be repeated: where no seed is given, 0 is; each row adds its line.

    Raises:
        InvalidInputError: a sampling value out of range.
    """
    checked = SamplingParams(**sampling)
    if checked.temperature > 0:
        checked = SamplingParams(**{**sampling, "seed": ((checked.seed or 0) + line) % 2**63})
    return Prompt(line=line, text=text, task=task, sampling=checked)
