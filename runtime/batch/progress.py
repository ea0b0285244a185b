"""How far a run is, how fast it goes, and what it did in the end.

It knows nothing of terminals.
Read first: the rate counts rows that this process dealt with, not those that an earlier one left behind.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["locating", "answering"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a phase stands.

    Args:
        phase: which one.
        done: rows dealt with, by earlier processes too.
        total: rows of the phase.
        rows_per_s: of this process; 0 before the first.
        eta_s: seconds to the end of the phase at this rate; None before the first row.
    """

    phase: Phase
    done: int
    total: int
    rows_per_s: float
    eta_s: float | None


class Pace:
    """Counts the rows of one phase.

    Args:
        phase: which one.
        total: rows in all.
        done: rows that earlier processes have done.
        report: gets the progress now and after each `add`.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        phase: Phase,
        *,
        total: int,
        done: int,
        report: Callable[[Progress], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._phase: Phase = phase
        self._total, self._before, self._done = total, done, done
        self._report, self._clock = report, clock
        self._started = clock()
        self.add(0)

    def add(self, rows: int) -> None:
        """So many rows more are done."""
        self._done += rows
        own, seconds = self._done - self._before, self.seconds
        rate = own / seconds if own and seconds > 0 else 0.0
        eta = (self._total - self._done) / rate if rate else None
        progress = Progress(phase=self._phase, done=self._done, total=self._total, rows_per_s=rate, eta_s=eta)
        self._report(progress)

    @property
    def seconds(self) -> float:
        """Since the phase began in this process."""
        return self._clock() - self._started


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """What a run did; `report.json` holds these fields.

    Args:
        rows: of the source.
        answered: rows with an answer.
        failed: rows in the side file.
        prompt_tokens: of the answered rows.
        tokens: new ones.
        tasks: task -> rows that it answered; "" is the base alone.
        expert_loads: expert sets read from disk, counted again each time.
        loads_per_expert: the same divided by how many different ones were read; 1 is the least.
        bytes_read: of experts.
        shards: pieces of the run.
        shards_resumed: of these, done by an earlier process.
        locating_s: of this process.
        answering_s: of this process.
        seconds: of this process, reading and writing files included.
        rows_per_s: answered or failed by this process, over all its seconds.
        tokens_per_s: new tokens of this process over `answering_s`.
        generation: of the repertoire.
    """

    rows: int
    answered: int
    failed: int
    prompt_tokens: int
    tokens: int
    tasks: dict[str, int] = field(default_factory=dict)
    expert_loads: int
    loads_per_expert: float
    bytes_read: int
    shards: int
    shards_resumed: int
    locating_s: float
    answering_s: float
    seconds: float
    rows_per_s: float
    tokens_per_s: float
    generation: int
