"""What a run leaves behind: the answers in one file or in parts, the side file of bad rows, and the report.

It knows nothing of engines or of how far the run is; shards are read from the work folder.
Read first: one file has its rows in the order of the source. In a folder each shard is a part, `part-000000.jsonl`,
which appears as soon as it is answered, with its rows in the order of the source too.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

from runtime.batch.job import Job
from runtime.batch.openai_rows import error_line, response
from runtime.batch.plan import Shard
from runtime.batch.rows import Answer, BadRow, Content, Location
from runtime.batch.sources import SUFFIXES
from runtime.batch.spool import Spool
from runtime.batch.targets import Columns, json_line, write_rows
from runtime.batch.work import WorkFolder

_BAD, _REPORT, _PART = "bad.jsonl", "report.json", "part-"


@dataclass
class Totals:
    """Sums over the shards that are answered."""

    rows: int = 0
    answered: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    bytes_read: int = 0
    tasks: dict[str, int] = field(default_factory=dict)
    set_loads: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Writes what a run has found.

    Args:
        job: says where to, and in which format.
        columns: of the source.
        spool: its rows.
        located: row -> task and how it was found.
        bad: row -> why it was left out before it was answered.
        work: has the answers.
    """

    job: Job
    columns: Columns
    spool: Spool
    located: Mapping[int, Location]
    bad: Mapping[int, BadRow]
    work: WorkFolder

    def begin(self, shards: Sequence[Shard]) -> None:
        """In a folder: remove what other runs left, and write the parts of which an earlier process wrote none."""
        if not self.job.target_is_folder:
            return
        found = self.job.target.names()
        wanted = {self._part(number) for number in self.work.answered}
        for name in found:
            if name.startswith(_PART) and name not in wanted:
                (self.job.target / name).remove()
        for number in sorted(self.work.answered):
            if self._part(number) not in found:
                self.put(shards[number])

    def put(self, shard: Shard) -> None:
        """A shard was answered."""
        if self.job.target_is_folder:
            answers = dict(zip(shard.rows, self.work.get_answered(shard.number).answers, strict=True))
            rows = (self._row(row, answers[row]) for row in sorted(answers) if answers[row].bad is None)
            write_rows(self.job.target / self._part(shard.number), self.job.target_format, rows, self.columns)

    def finish(self, shards: Sequence[Shard]) -> None:
        """All shards are answered: write the one file, and the bad rows."""
        bad = dict(self.bad)
        with closing(Spool()) as answers:
            places = array("q", [-1]) * len(self.spool)
            for shard in shards:
                for row, answer in zip(shard.rows, self.work.get_answered(shard.number).answers, strict=True):
                    if answer.bad is not None:
                        bad[row] = answer.bad
                    elif not self.job.target_is_folder:
                        places[row] = len(answers)
                        answers.add(answer.line, asdict(answer))
            if not self.job.target_is_folder:
                write_rows(self.job.target, self.job.target_format, self._in_order(answers, places), self.columns)
        side = self.job.side(_BAD)
        if bad:
            side.write(b"".join(json_line(self._bad_line(row, bad[row])) for row in sorted(bad)))
        else:
            side.remove()

    def write_report(self, report: Content) -> None:
        """Beside the answers."""
        self.job.side(_REPORT).write(json.dumps(report, indent=1).encode() + b"\n")

    def totals(self, shards: Sequence[Shard]) -> Totals:
        """Of all shards that any process has answered."""
        totals, tasks = Totals(), Counter[str]()
        for number in sorted(self.work.answered):
            answered = self.work.get_answered(number)
            totals.bytes_read += answered.bytes_read
            totals.set_loads.update(answered.set_loads)
            for row, answer in zip(shards[number].rows, answered.answers, strict=True):
                totals.rows += 1
                totals.tokens += answer.completion_tokens
                totals.prompt_tokens += answer.prompt_tokens
                if answer.bad is None:
                    totals.answered += 1
                    tasks[self.located[row].task or ""] += 1
        totals.tasks = dict(sorted(tasks.items()))
        return totals

    def _in_order(self, answers: Spool, places: Sequence[int]) -> Iterator[Content]:
        for row, place in enumerate(places):
            if place >= 0:
                yield self._row(row, Answer(**answers[place]))

    def _row(self, row: int, answer: Answer) -> Content:
        location, content = self.located[row], self.spool[row]
        if self.job.target_format == "openai":
            return response(content, location, answer, self.job.generation)
        routing: dict[str, Any] = {"task": location.task, "how": location.how, "margin": location.margin}
        return {
            **content,
            "answer": answer.text,
            "routing": {**routing, "generation": self.job.generation},
            "usage": {
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": answer.completion_tokens,
                "finish_reason": answer.finish_reason,
            },
        }

    def _bad_line(self, row: int, bad: BadRow) -> Content:
        return error_line(bad, self.spool[row]) if self.job.target_format == "openai" else asdict(bad)

    def _part(self, number: int) -> str:
        return f"{_PART}{number:06d}{SUFFIXES[self.job.target_format]}"
