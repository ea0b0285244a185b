"""Events on their way to an event loop: none lost, none out of order, and few wake-ups."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from runtime.engine.request import Alternative, Event, Failed, Finished, Located, TokenDelta, TokenLogprob, Usage
from runtime.errors import CancelledError
from runtime.service.event_stream import EventStream
from runtime.service.mailbox import Mailbox

LIMIT_S = 20.0
LOCATED = Located(task="a", how="pinned", margin=0, scores=(), generation=1, experts=())
USAGE = Usage(prompt_tokens=1, completion_tokens=1, queue_s=0, first_token_s=0, total_s=0)
FINISHED = Finished(reason="stop", usage=USAGE)


class Counting:
    """An event loop that counts how often it is woken, and fires timers when it is told."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.wakes = 0
        self.timers: list[Callable[[], None]] = []

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        self.wakes += 1
        self.loop.call_soon_threadsafe(callback)

    def call_later(self, _delay_s: float, callback: Callable[[], None]) -> None:
        self.timers.append(callback)

    def fire(self) -> None:
        due, self.timers = self.timers, []
        for callback in due:
            callback()


@pytest.mark.parametrize("window_s", [0.0, 0.001])
def test_nothing_is_lost_or_out_of_order_from_many_threads(window_s: float) -> None:
    async def main() -> list[list[int]]:
        mailbox = Mailbox(asyncio.get_running_loop(), window_s=window_s)
        received: list[list[int]] = [[] for _ in range(4)]
        full = asyncio.Event()

        def keep(number: int, item: int) -> None:
            received[number].append(item)
            if sum(map(len, received)) == 4000:
                full.set()

        def post(number: int) -> None:
            sink = mailbox.sink(lambda item: keep(number, item), urgent=lambda item: item % 7 == 0)
            for item in range(1000):
                sink(item)

        threads = [threading.Thread(target=post, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        await asyncio.wait_for(full.wait(), LIMIT_S)
        for thread in threads:
            thread.join()
        return received

    assert asyncio.run(main()) == [list(range(1000))] * 4


def test_what_comes_before_the_loop_looks_wakes_it_once() -> None:
    async def main() -> tuple[int, list[int]]:
        loop = Counting(asyncio.get_running_loop())
        mailbox = Mailbox(loop, window_s=0.0)  # type: ignore[arg-type]
        received: list[int] = []
        sink = mailbox.sink(received.append)
        for item in range(5):
            sink(item)
        await asyncio.sleep(0)
        return loop.wakes, received

    assert asyncio.run(main()) == (1, [0, 1, 2, 3, 4])


def test_within_the_window_only_what_is_urgent_wakes_the_loop() -> None:
    async def main() -> None:
        loop = Counting(asyncio.get_running_loop())
        mailbox = Mailbox(loop, window_s=1.0)  # type: ignore[arg-type]
        received: list[str] = []
        sink = mailbox.sink(received.append, urgent=lambda item: item == "urgent")
        sink("first")
        await asyncio.sleep(0)
        assert (loop.wakes, received) == (1, ["first"])
        sink("patient")
        await asyncio.sleep(0)
        assert (loop.wakes, received) == (1, ["first"])
        sink("urgent")
        await asyncio.sleep(0)
        assert (loop.wakes, received) == (2, ["first", "patient", "urgent"])
        sink("later")
        loop.fire()
        assert received[-1] == "later"
        loop.fire()
        assert not loop.timers, "an idle mailbox does not look"
        sink("again")
        await asyncio.sleep(0)
        assert (loop.wakes, received[-1]) == (3, "again")

    asyncio.run(main())


def test_a_closed_loop_is_nobody_to_tell() -> None:
    loop = asyncio.new_event_loop()
    sink = Mailbox(loop, window_s=0.0).sink(lambda _item: None)
    loop.close()
    sink("too late")
    assert loop.is_closed()


# ---- streams


def read_all(stream: EventStream) -> list[Event]:
    async def main() -> list[Event]:
        return [event async for event in stream]

    return asyncio.run(main())


def delta(text: str, token: int, choice: int = 0) -> TokenDelta:
    return TokenDelta(text, (token,), choice, (TokenLogprob(Alternative(token, text, -1.0), ()),))


def filled(*, merge: bool, events: list[Event]) -> EventStream:
    stream = EventStream(merge=merge)
    for event in events:
        stream.put(event)
    return stream


EVENTS: list[Event] = [
    LOCATED,
    delta("a", 1),
    delta("x", 9, 1),
    delta("b", 2),
    delta("y", 8, 1),
    delta("c", 3),
    FINISHED,
]


def test_unread_tokens_become_one_delta_per_choice() -> None:
    first, one, other, last = read_all(filled(merge=True, events=EVENTS))
    assert (first, last) == (LOCATED, FINISHED)
    assert isinstance(one, TokenDelta)
    assert isinstance(other, TokenDelta)
    assert (one.text, one.token_ids, one.choice, len(one.logprobs)) == ("abc", (1, 2, 3), 0, 3)
    assert (other.text, other.token_ids, other.choice, len(other.logprobs)) == ("xy", (9, 8), 1, 2)


def test_without_merging_every_event_comes_as_it_was() -> None:
    assert read_all(filled(merge=False, events=EVENTS)) == EVENTS


def test_what_was_read_is_not_merged_into() -> None:
    async def main() -> list[Event]:
        stream = EventStream(merge=True)
        stream.put(delta("a", 1))
        first = await anext(stream)
        for event in (delta("b", 2), delta("c", 3), FINISHED):
            stream.put(event)
        return [first, *[event async for event in stream]]

    first, second, _ = asyncio.run(main())
    assert isinstance(first, TokenDelta)
    assert isinstance(second, TokenDelta)
    assert (first.text, second.text) == ("a", "bc")


def test_a_failure_is_raised_after_what_came_before_it() -> None:
    async def main() -> list[Event]:
        stream = filled(merge=True, events=[delta("a", 1), Failed(CancelledError("x"))])
        seen: list[Event] = [await anext(stream)]
        with pytest.raises(CancelledError):
            await anext(stream)
        assert [event async for event in stream] == []
        return seen

    assert len(asyncio.run(main())) == 1


def test_decision_and_end_are_told_when_they_arrive_and_tokens_are_not() -> None:
    heard: list[Event] = []
    stream = EventStream(heard.append)
    for event in EVENTS:
        stream.put(event)
    assert heard == [LOCATED, FINISHED]
    assert (stream.begun, stream.ended) == (True, True)
