"""Offline: a JSONL file of inputs in, a JSONL file of answers out, through the same engine.

It knows nothing of the command line; progress and bad lines are reported through callables.
Read first: rows come out in the order in which they went in. A line that cannot be answered is reported and left out;
the others are unharmed. The output file appears whole, by a rename, when the last row is written.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from runtime.engine.engine import Engine
from runtime.engine.request import Event, Failed, Finished, Located, Request, SamplingParams, TokenDelta
from runtime.errors import DataError, GreenroomError, InvalidInputError

ADDED_FIELDS = ("answer", "routing", "usage")
_WINDOW_PER_SLOT = 4


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """What a run did; `tokens` are new ones."""

    rows: int
    answered: int
    failed: int
    tokens: int
    seconds: float
    expert_loads: int


@dataclass
class _Row:
    """One line on its way through the engine."""

    line: int
    content: dict[str, Any]
    events: list[Event] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def sink(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished | Failed):
            self.ended.set()

    def fail(self, error: GreenroomError) -> None:
        self.sink(Failed(error))


def run_batch(
    engine: Engine,
    source: Path,
    target: Path,
    *,
    sampling: SamplingParams,
    on_progress: Callable[[int], None],
    on_bad_line: Callable[[DataError], None],
) -> BatchReport:
    """Answer every line of `source`.

    A line is a JSON object with `input` (text), and optionally `task` (pins it) and `max_tokens`; all of its fields are
    carried over into the output row, which adds `answer`, `routing` (task, how, margin, generation) and `usage`.

    Args:
        engine: started.
        source: JSONL.
        target: JSONL; replaced as a whole.
        sampling: for rows that do not say otherwise.
        on_progress: gets the number of lines dealt with.
        on_bad_line: gets every line that was left out, and why.

    Raises:
        DataError: `source` cannot be read at all.
    """
    started = time.monotonic()
    loads_before = engine.statistics().memory.loads
    window = max(1, engine.max_running * _WINDOW_PER_SLOT)
    counts = {"rows": 0, "answered": 0, "tokens": 0}
    pending: deque[_Row] = deque()
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")

    def write_oldest() -> None:
        row = pending.popleft()
        row.ended.wait()
        last = row.events[-1]
        counts["rows"] += 1
        if isinstance(last, Failed):
            on_bad_line(DataError(str(source), row.line, str(last.error)))
        else:
            assert isinstance(last, Finished), "an ended row ends with one of two events"
            counts["answered"] += 1
            counts["tokens"] += last.usage.completion_tokens
            output.write(json.dumps(_output(row, last), ensure_ascii=False) + "\n")
        on_progress(counts["rows"])

    try:
        with partial.open("w", encoding="utf-8") as output:
            for row in _rows(source):
                if not row.ended.is_set():
                    _submit(engine, row, sampling)
                pending.append(row)
                while len(pending) >= window:
                    write_oldest()
            while pending:
                write_oldest()
            output.flush()
            os.fsync(output.fileno())
        partial.replace(target)
    finally:
        for row in pending:
            engine.cancel(_request_id(row))
        partial.unlink(missing_ok=True)
    return BatchReport(
        **counts,
        failed=counts["rows"] - counts["answered"],
        seconds=time.monotonic() - started,
        expert_loads=engine.statistics().memory.loads - loads_before,
    )


def _rows(source: Path) -> Iterator[_Row]:
    """Every line that is not blank; a malformed one has already failed."""
    try:
        with source.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parse(number, line)
    except OSError as error:
        raise DataError(str(source), 0, f"cannot be read: {error.strerror}") from error


def _parse(number: int, line: bytes) -> _Row:
    try:
        content = json.loads(line)
    except ValueError as error:
        row = _Row(number, {})
        row.fail(InvalidInputError("line", line.decode(errors="replace").strip(), f"is not JSON: {error}"))
        return row
    row = _Row(number, content if isinstance(content, dict) else {})
    problem = _problem(content)
    if problem is not None:
        row.fail(problem)
    return row


def _problem(content: object) -> InvalidInputError | None:
    if not isinstance(content, dict):
        return InvalidInputError("line", content, "must be a JSON object")
    for name, kind, required in (("input", str, True), ("task", str, False), ("max_tokens", int, False)):
        value = content.get(name)
        if (value is not None or required) and (not isinstance(value, kind) or isinstance(value, bool)):
            return InvalidInputError(name, value, f"must be {'text' if kind is str else 'a whole number'}")
    for name in ADDED_FIELDS:
        if name in content:
            return InvalidInputError(name, content[name], "would be overwritten by the answer; rename it")
    return None


def _request_id(row: _Row) -> str:
    return f"batch-line-{row.line}"


def _submit(engine: Engine, row: _Row, sampling: SamplingParams) -> None:
    fields = asdict(sampling)
    try:
        if row.content.get("max_tokens") is not None:
            fields["max_tokens"] = row.content["max_tokens"]
        request = Request(
            request_id=_request_id(row),
            text=row.content["input"],
            task=row.content.get("task"),
            sampling=SamplingParams(**fields),
        )
        engine.submit(request, row.sink)
    except GreenroomError as error:
        row.fail(error)


def _output(row: _Row, last: Finished) -> dict[str, Any]:
    located = next(event for event in row.events if isinstance(event, Located))
    return {
        **row.content,
        "answer": "".join(event.text for event in row.events if isinstance(event, TokenDelta)),
        "routing": {
            "task": located.task,
            "how": located.how,
            "margin": located.margin,
            "generation": located.generation,
        },
        "usage": {
            "prompt_tokens": last.usage.prompt_tokens,
            "completion_tokens": last.usage.completion_tokens,
            "finish_reason": last.reason,
        },
    }
