"""Guesses on arrival: made while the request is on its way already, and never left behind, however late they come."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from engines import ask, until
from repertoires import Workshop

from runtime.engine.engine import Engine
from runtime.engine.request import Request, SamplingParams
from runtime.engine.sequence import Sequence
from runtime.errors import BlobMissingError
from runtime.memory.reservation import Prefetch, Reservation
from runtime.memory.wanted import VisibleSet

MakeEngine = Callable[..., Engine]


class Meanwhile:
    """An expert memory whose guesses are made while the engine's thread does something to the sequence."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act
        self.guessed: list[str] = []
        self.withdrawn: list[Prefetch] = []

    def prefetch(self, visible: VisibleSet, *, tenant: str) -> Prefetch:
        assert tenant == ""
        self.guessed.append(visible.task)
        self.act()
        return Prefetch((), on_cancel=self.withdrawn.append)


def sequence_of(engine: Engine, text: str, *, task_weights: dict[str, float] | None = None) -> Sequence:
    """A sequence as `submit` makes it, of which the engine knows nothing."""
    request = Request(request_id="r", text=text, sampling=SamplingParams(max_tokens=1), task_weights=task_weights or {})
    return engine._arrival.sequence(request, engine.generation, lambda _event: None)


def decide(sequence: Sequence, task: str | None) -> None:
    sequence.task = task
    sequence.decided = True


def reserve(sequence: Sequence) -> None:
    decide(sequence, "red")
    nothing = VisibleSet(task="red", routers=None, wanted=())
    sequence.reservation = Reservation(nothing, started=0.0, on_release=lambda _reservation: None)


@pytest.mark.parametrize(
    ("act", "withdrawn"),
    [
        (lambda _sequence: None, 0),
        (lambda sequence: decide(sequence, "red"), 0),
        (lambda sequence: decide(sequence, "green"), 1),
        (lambda sequence: decide(sequence, None), 1),
        (reserve, 1),
        (lambda sequence: sequence.finish("stop"), 1),
    ],
    ids=["nothing", "right", "wrong", "no task", "reserved", "ended"],
)
def test_a_guess_that_comes_too_late_is_withdrawn_by_who_made_it(
    three_tasks: Workshop,
    make_engine: MakeEngine,
    prototypes: dict[str, str],
    act: Callable[[Sequence], object],
    withdrawn: int,
) -> None:
    engine = make_engine(three_tasks)
    sequence = sequence_of(engine, prototypes["red"])
    memory = engine._casting._memory = Meanwhile(lambda: act(sequence))  # type: ignore[assignment]
    engine._casting.guess(sequence)
    assert memory.guessed == ["red"]
    assert len(memory.withdrawn) == withdrawn
    engine._casting._memory = engine.memory


def test_a_sequence_that_is_decided_already_needs_no_guess(
    three_tasks: Workshop, make_engine: MakeEngine, prototypes: dict[str, str]
) -> None:
    engine = make_engine(three_tasks)
    sequence = sequence_of(engine, prototypes["red"])
    decide(sequence, "red")
    engine._casting.guess(sequence)
    assert sequence.guess is None


def test_a_guess_at_a_task_that_cannot_be_served_harms_no_request(
    three_tasks: Workshop, make_engine: MakeEngine, prototypes: dict[str, str]
) -> None:
    engine = make_engine(three_tasks)
    engine.generation.densities.faults["red"] = BlobMissingError("red's router is gone")
    sequence = sequence_of(engine, prototypes["red"])
    engine._casting.guess(sequence)
    assert sequence.guess is None
    del engine.generation.densities.faults["red"]
    assert ask(engine, prototypes["red"]).wait().error is None


def test_a_guess_is_over_once_all_that_a_sequence_can_touch_is_reserved(
    three_tasks: Workshop, make_engine: MakeEngine, prototypes: dict[str, str]
) -> None:
    engine = make_engine(three_tasks)
    casting = engine._casting
    ended: list[Prefetch] = []
    located = sequence_of(engine, prototypes["red"])
    together = sequence_of(engine, prototypes["red"], task_weights={"red": 0.5, "green": 0.5})
    for sequence in (located, together):
        sequence.guess = Prefetch((), on_cancel=ended.append)
    decide(located, "red")
    assert casting.stage(located)
    assert ended == [located.guess]
    decide(together, "red + green")
    assert casting.stage(together)
    assert ended == [located.guess], "routers alone are reserved, which will tell the experts"
    together.layers_done = engine.generation.manifest.first_layer

    def is_cast() -> bool:
        casting.check(together)
        return together.mixture is not None

    until(is_cast)
    assert casting.stage(together)
    assert ended == [located.guess, together.guess]
    for sequence in (located, together):
        assert sequence.reservation is not None
        sequence.reservation.release()


def test_nobody_waits_for_a_guess(three_tasks: Workshop, make_engine: MakeEngine, prototypes: dict[str, str]) -> None:
    engine = make_engine(three_tasks)
    begun, go_on = threading.Event(), threading.Event()
    made: list[str] = []

    def guess(sequence: Sequence) -> None:
        begun.set()
        go_on.wait(30)
        made.append(sequence.request.text)

    engine._guessing._guess = guess
    with engine.together():  # none is decided before its guess has begun
        first = ask(engine, prototypes["red"])
        assert begun.wait(30)
        second = ask(engine, prototypes["green"])
    assert [first.wait().located.task, second.wait().located.task] == ["red", "green"]
    assert made == []
    go_on.set()
    until(lambda: bool(made))
    engine._guessing.close()
    assert made == [prototypes["red"]], "the second was decided by then"


def test_a_guess_that_breaks_is_told_and_costs_no_other(
    three_tasks: Workshop, make_engine: MakeEngine, prototypes: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(three_tasks)
    made: list[str] = []

    def guess(sequence: Sequence) -> None:
        if not caplog.records:
            raise RuntimeError("broken")
        made.append(sequence.request.text)

    engine._guessing._guess = guess
    with engine.together():
        answers = [ask(engine, prototypes[task]) for task in ("red", "green")]
        until(lambda: bool(made))
    assert made == [prototypes["green"]]
    assert f"request {answers[0].request_id}: its task could not be guessed" in caplog.text
    assert [answer.wait().located.task for answer in answers] == ["red", "green"]


def test_a_guess_is_withdrawn_once_however_many_threads_want_it() -> None:
    for _ in range(50):
        calls: list[Prefetch] = []
        guess = Prefetch((), on_cancel=calls.append)
        together = threading.Barrier(8)

        def cancel(guess: Prefetch = guess, together: threading.Barrier = together) -> None:
            together.wait(10)
            guess.cancel()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: cancel(), range(8)))
        assert calls == [guess]
