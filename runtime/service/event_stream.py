"""The events of one request, from whoever delivers them to whoever reads them, on one event loop.

It knows nothing of threads or engines.
Read first: where tokens may be merged, those that nobody has read yet become one delta per choice, so a message to the
client carries all that came since the last.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from runtime.engine.request import Event, Failed, Finished, Located, TokenDelta

Told = Callable[[Located | Finished | Failed], None]
"""Hears of a request's decision and of its end."""


class EventStream:
    """Events in order, up to and including `Finished`; a `Failed` is raised as its error.

    Args:
        told: hears of the events that are not tokens.
        merge: whether unread tokens may become one delta.

    `begun` says whether a token has arrived, `ended` whether the last event has, read or not.
    """

    def __init__(self, told: Told = lambda _event: None, *, merge: bool = False) -> None:
        self._told = told
        self._merge = merge
        self._unread: deque[list[TokenDelta] | Located | Finished | Failed] = deque()
        self._open: dict[int, list[TokenDelta]] = {}  # choice -> its deltas in `_unread` that more may join
        self._waiter: asyncio.Future[None] | None = None
        self._read_last = False
        self.begun = False
        self.ended = False

    def put(self, event: Event) -> None:
        """Take an event. What is unread is bounded by the tokens that a request may generate."""
        if isinstance(event, TokenDelta):
            self._put_delta(event)
        else:
            self._open.clear()
            self._unread.append(event)
            self.ended = isinstance(event, Finished | Failed)
            self._told(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _put_delta(self, event: TokenDelta) -> None:
        self.begun = True
        together = self._open.get(event.choice)
        if together is not None:
            together.append(event)
            return
        self._unread.append([event])
        if self._merge:
            self._open[event.choice] = self._unread[-1]  # type: ignore[assignment]  # just appended

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Located | TokenDelta | Finished:
        if self._read_last:
            raise StopAsyncIteration
        while not self._unread:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        event = self._unread.popleft()
        if isinstance(event, list):
            self._open.pop(event[0].choice, None)
            return event[0] if len(event) == 1 else _merged(event)
        self._read_last = isinstance(event, Finished | Failed)
        if isinstance(event, Failed):
            raise event.error
        return event


def _merged(deltas: list[TokenDelta]) -> TokenDelta:
    return TokenDelta(
        "".join(delta.text for delta in deltas),
        tuple(token for delta in deltas for token in delta.token_ids),
        deltas[0].choice,
        tuple(item for delta in deltas for item in delta.logprobs),
    )
