"""What one engine does with a handful of rows: locate them, or answer them, the same way every time.

It knows nothing of files or other workers.
Read first: rows given together are computed together, from an idle engine with their experts already in memory, so the
engine takes the same steps whatever ran before and however long a disk took; no prompt begins where an earlier one
left off. What an engine answers is thereby a function of the rows given together, which makes a resumed run and a run
on other machines give the same bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from runtime.batch.rows import Answer, BadRow, Location, Prompt
from runtime.engine.engine import Engine
from runtime.engine.hold import hold
from runtime.engine.request import Event, Failed, Finished, Located, Request, TokenDelta
from runtime.errors import CancelledError, GreenroomError, UnavailableError


@dataclass(frozen=True, kw_only=True)
class Answered:
    """Rows that were answered together.

    Args:
        answers: one for each prompt, in the same order.
        set_loads: expert set -> how often some of it was read from disk.
        bytes_read: from disk.
    """

    answers: tuple[Answer, ...]
    set_loads: dict[str, int]
    bytes_read: int


class _Collected:
    """The events of rows that run together."""

    def __init__(self, count: int) -> None:
        self.events: list[list[Event]] = [[] for _ in range(count)]
        self._left = count
        self._ended = threading.Event()

    def sink(self, place: int, event: Event) -> None:
        self.events[place].append(event)
        if isinstance(event, Finished | Failed):
            self._left -= 1
            if not self._left:
                self._ended.set()

    def wait(self) -> list[list[Event]]:
        if self.events:
            self._ended.wait()
        return self.events


def locate(engine: Engine, prompts: Sequence[Prompt]) -> tuple[Location, ...]:
    """Which task answers each prompt, in their order; no expert is loaded.

    Raises:
        UnavailableError: the engine stopped.
    """
    requests = [
        Request(
            request_id=f"locate-{prompt.line}",
            text=prompt.text,
            locate_only=True,
            sampling=prompt.sampling,
            share_prefix=False,
        )
        for prompt in prompts
    ]
    locations = []
    for prompt, events in zip(prompts, _run(engine, requests), strict=True):
        line, last = prompt.line, events[-1]
        if isinstance(last, Failed):
            bad = BadRow.of(line, _of_the_row(last.error))
            locations.append(Location(line=line, task=None, how="base", margin=0.0, bad=bad))
            continue
        located = next(event for event in events if isinstance(event, Located))
        locations.append(Location(line=line, task=located.task, how=located.how, margin=located.margin))
    return tuple(locations)


def answer(engine: Engine, prompts: Sequence[Prompt]) -> Answered:
    """Answer prompts whose tasks are known.

    Args:
        engine: started, and idle.
        prompts: with `task`, or `base_only`; their tasks' experts fit into memory together.

    Raises:
        UnavailableError: the engine stopped.
    """
    broken: dict[str, GreenroomError] = {}
    set_loads: dict[str, int] = {}
    bytes_read = 0
    with ExitStack() as held:
        for task in dict.fromkeys(prompt.task for prompt in prompts if prompt.task is not None):
            try:
                reservation = held.enter_context(hold(engine, task))
            except GreenroomError as error:
                broken[task] = _of_the_row(error)
                continue
            for digest in reservation.expert_sets():
                read = reservation.bytes_read(digest)
                bytes_read += read
                if read:
                    set_loads[digest] = 1
        good = [prompt for prompt in prompts if prompt.task not in broken]
        requests = [
            Request(
                request_id=f"answer-{prompt.line}",
                text=prompt.text,
                task=prompt.task,
                base_only=prompt.base_only,
                sampling=prompt.sampling,
                share_prefix=False,
            )
            for prompt in good
        ]
        ended = zip(good, _run(engine, requests), strict=True)
        done = {prompt.line: _answer(prompt.line, events) for prompt, events in ended}
    answers = tuple(
        done.get(prompt.line) or Answer(line=prompt.line, bad=BadRow.of(prompt.line, broken[prompt.task or ""]))
        for prompt in prompts
    )
    return Answered(answers=answers, set_loads=set_loads, bytes_read=bytes_read)


def _run(engine: Engine, requests: Sequence[Request]) -> list[list[Event]]:
    """The events of requests that begin together."""
    collected = _Collected(len(requests))
    with engine.together():
        for place, request in enumerate(requests):
            sink = partial(collected.sink, place)
            try:
                engine.submit(request, sink)
            except GreenroomError as error:
                sink(Failed(error))
    return collected.wait()


def _answer(line: int, events: Iterable[Event]) -> Answer:
    *_, last = events
    if isinstance(last, Failed):
        return Answer(line=line, bad=BadRow.of(line, _of_the_row(last.error)))
    assert isinstance(last, Finished), "an ended row ends with one of two events"
    return Answer(
        line=line,
        text="".join(event.text for event in events if isinstance(event, TokenDelta)),
        prompt_tokens=last.usage.prompt_tokens,
        completion_tokens=last.usage.completion_tokens,
        finish_reason=last.reason,
    )


def _of_the_row(error: GreenroomError) -> GreenroomError:
    """The error again if it is about the row or its task; one of the engine ends the run."""
    if type(error) is GreenroomError or isinstance(error, UnavailableError | CancelledError):
        raise error
    return error
