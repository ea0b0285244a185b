"""A run: read and check all rows, locate them, answer them shard by shard, write what came of it.

It knows nothing of the command line, nor of who locates and answers (`runtime.batch.workers`).
Read first: four steps, of which the two long ones are kept piece by piece in the work folder. A process that finds the
folder of the same run there reads the source again and goes on behind the last whole piece; since every piece is
computed the same way each time, the result has the same bytes as that of a run that was never interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field

from runtime.batch.job import Job
from runtime.batch.openai_rows import prompt_of_request
from runtime.batch.outcome import Outcome
from runtime.batch.plan import Shard, make_plan
from runtime.batch.progress import BatchReport, Pace, Progress
from runtime.batch.rows import LOCATE_ROWS, BadRow, Content, Location, Prompt, prompt_of
from runtime.batch.sources import read_rows
from runtime.batch.spool import Spool
from runtime.batch.targets import Columns
from runtime.batch.work import WorkFolder
from runtime.batch.workers import Piece, Workers
from runtime.errors import InvalidInputError


@dataclass
class _Rows:
    """The source, read."""

    spool: Spool
    columns: Columns
    prompts: Callable[[int], Prompt]
    to_locate: list[int] = field(default_factory=list)
    lengths: dict[int, int] = field(default_factory=dict)
    located: dict[int, Location] = field(default_factory=dict)
    bad: dict[int, BadRow] = field(default_factory=dict)


def run_batch(job: Job, workers: Workers, *, on_progress: Callable[[Progress], None]) -> BatchReport:
    """Answer every row of a source; those that cannot be answered go to a side file.

    Args:
        job: what to run.
        workers: who does it.
        on_progress: called at the beginning of each of the two passes and after each piece.

    Raises:
        DataError: the source cannot be read at all.
        InvalidInputError: an unfinished run of another job is in the work folder.
        UnavailableError: an engine stopped; what was done is kept.
    """
    started = time.monotonic()
    digest = job.source.sha256()
    work = WorkFolder(job.target.beside(".work"), job.identity(digest), fresh=job.fresh)
    with closing(Spool()) as spool:
        rows = _read(job, spool)
        locating_s = _locate(rows, work, workers, on_progress)
        entries = [(number, rows.located[number].task, rows.lengths[number]) for number in rows.located]
        shards = make_plan(entries, sizes=job.sizes, budget_bytes=job.budget_bytes, shard_rows=job.shard_rows)
        outcome = Outcome(job=job, columns=rows.columns, spool=spool, located=rows.located, bad=rows.bad, work=work)
        resumed = len(work.answered)
        before = outcome.totals(shards)
        outcome.begin(shards)
        answering_s = _answer(rows, shards, work, workers, outcome, on_progress)
        outcome.finish(shards)
        totals = outcome.totals(shards)
        num_rows = len(spool)
    seconds = time.monotonic() - started
    own_rows = totals.rows - before.rows
    report = BatchReport(
        rows=num_rows,
        answered=totals.answered,
        failed=num_rows - totals.answered,
        prompt_tokens=totals.prompt_tokens,
        tokens=totals.tokens,
        tasks=totals.tasks,
        expert_loads=sum(totals.set_loads.values()),
        loads_per_expert=sum(totals.set_loads.values()) / max(1, len(totals.set_loads)),
        bytes_read=totals.bytes_read,
        shards=len(shards),
        shards_resumed=resumed,
        locating_s=locating_s,
        answering_s=answering_s,
        seconds=seconds,
        rows_per_s=own_rows / seconds,
        tokens_per_s=(totals.tokens - before.tokens) / answering_s if answering_s else 0.0,
        generation=job.generation,
    )
    outcome.write_report(asdict(report))
    work.remove()
    return report


def _read(job: Job, spool: Spool) -> _Rows:
    """Every row checked and put aside; bad ones too, since they are told of in the end."""
    sampling = asdict(job.sampling)
    parse = prompt_of_request if job.source_format == "openai" else prompt_of
    rows = _Rows(spool, Columns(job.target_format), lambda number: parse(spool.lines[number], spool[number], sampling))
    for read in read_rows(job.source, job.source_format):
        if isinstance(read, BadRow):
            number, line, content = len(spool), read.line, Content()
            rows.bad[number] = read
        else:
            number, (line, content) = len(spool), read
            try:
                prompt = parse(line, content, sampling)
                rows.columns.add(content)
                rows.lengths[number] = len(prompt.text)
                if prompt.task is None:
                    rows.to_locate.append(number)
                else:
                    rows.located[number] = Location(line=line, task=prompt.task, how="pinned", margin=0.0)
            except InvalidInputError as error:
                rows.bad[number] = BadRow.of(line, error)
        spool.add(line, content)
    return rows


def _locate(rows: _Rows, work: WorkFolder, workers: Workers, on_progress: Callable[[Progress], None]) -> float:
    chunks = [rows.to_locate[begin : begin + LOCATE_ROWS] for begin in range(0, len(rows.to_locate), LOCATE_ROWS)]

    def pieces() -> Iterator[Piece]:
        for number, chunk in enumerate(chunks):
            if number not in work.located:
                yield number, tuple(rows.prompts(row) for row in chunk)

    done = sum(len(chunks[number]) for number in work.located)
    pace = Pace("locating", total=len(rows.to_locate), done=done, report=on_progress)
    for number, locations in workers.locate(pieces()):
        work.put_located(number, locations)
        pace.add(len(locations))
    for number, chunk in enumerate(chunks):
        for row, location in zip(chunk, work.get_located(number), strict=True):
            if location.bad is None:
                rows.located[row] = location
            else:
                rows.bad[row] = location.bad
    return pace.seconds


def _answer(  # noqa: PLR0917 - the run's parts
    rows: _Rows,
    shards: list[Shard],
    work: WorkFolder,
    workers: Workers,
    outcome: Outcome,
    on_progress: Callable[[Progress], None],
) -> float:
    def pieces() -> Iterator[Piece]:
        for shard in shards:
            if shard.number not in work.answered:
                yield shard.number, tuple(_with_task(rows.prompts(row), rows.located[row]) for row in shard.rows)

    done = sum(len(shards[number].rows) for number in work.answered)
    pace = Pace("answering", total=sum(len(shard.rows) for shard in shards), done=done, report=on_progress)
    for number, answered in workers.answer(pieces()):
        work.put_answered(number, answered)
        outcome.put(shards[number])
        pace.add(len(answered.answers))
    return pace.seconds


def _with_task(prompt: Prompt, location: Location) -> Prompt:
    return Prompt(
        line=prompt.line,
        text=prompt.text,
        task=location.task,
        base_only=location.task is None,
        sampling=prompt.sampling,
    )
