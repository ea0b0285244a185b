"""An engine that plays a script instead of computing: for tests of everything around the real one.

It does not know tokens or experts; what a request does is written in its text.
Read first: a text is a line of verbs, see `ScriptedEngine`; a held request waits until `release`, never for a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import SimpleNamespace

from runtime.engine.request import (
    Alternative,
    Event,
    ExpertUse,
    Failed,
    Finished,
    LayerWeights,
    Located,
    Request,
    TaskScore,
    TokenDelta,
    TokenLogprob,
    Usage,
)
from runtime.engine.statistics import EngineStatistics, GraphCounts
from runtime.errors import CancelledError, DeadlineError, GreenroomError, InvalidInputError, UnavailableError
from runtime.memory.statistics import MemoryStatistics

PATIENCE_S = 10.0
DIGEST = "ab" * 32
MEMORY = MemoryStatistics(**{field.name: number for number, field in enumerate(fields(MemoryStatistics), start=1)})


@dataclass
class Running:
    request: Request
    sink: Callable[[Event], None]
    ended: bool = False


class ScriptedEngine:
    """Answers with its own text, word by word.

    - "hold ...": after the first word, waits until `release()`.
    - "refuse NAME": `submit` raises `refusals[NAME]`.
    - "fail NAME": the request ends in `refusals[NAME]` after it was located.
    """

    def __init__(self, refusals: dict[str, Exception] | None = None) -> None:
        self.refusals = refusals or {}
        base = SimpleNamespace(name="tiny", digest=DIGEST)
        experts = [SimpleNamespace(digest=DIGEST, bytes=4096, units=[SimpleNamespace(layer=layer) for layer in (2, 3)])]
        tasks = [SimpleNamespace(name="dates", experts=None), SimpleNamespace(name="orders", experts=DIGEST)]
        manifest = SimpleNamespace(
            base=base, generation=3, task_names=lambda: ("dates", "orders"), experts=experts, tasks=tasks
        )
        states = {2: SimpleNamespace(value="ready"), 3: SimpleNamespace(value="loading")}
        row = SimpleNamespace(digest=DIGEST, units=states, bytes=2048, pinned=True, error=None)
        self.memory = SimpleNamespace(residency=lambda: (row,))
        self.generation = SimpleNamespace(manifest=manifest)
        self.may_start = threading.Event()
        self.may_start.set()
        self.may_submit = threading.Event()
        self.may_submit.set()
        self.submitting = threading.Event()
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.closed = 0
        self._changed = threading.Condition()
        self._live: dict[str, Running] = {}
        self._refusing: str | None = "not started"

    def start(self) -> None:
        assert self.may_start.wait(PATIENCE_S)
        self._refusing = None

    def submit(self, request: Request, sink: Callable[[Event], None]) -> None:
        self.submitting.set()
        assert self.may_submit.wait(PATIENCE_S)
        verb, _, name = said(request).partition(" ")
        if verb == "refuse":
            raise self.refusals[name]
        if request.deadline is not None and request.deadline <= time.monotonic():
            raise DeadlineError("too late")
        with self._changed:
            if self._refusing is not None:
                raise UnavailableError(self._refusing)
            if request.request_id in self._live:
                raise InvalidInputError("request_id", request.request_id, "is in use by a request in flight")
            self.requests.append(request)
            running = self._live[request.request_id] = Running(request, sink)
            self._changed.notify_all()
        sink(self._located(request))
        if verb == "fail":
            error = self.refusals[name]
            assert isinstance(error, GreenroomError)
            self._end(running, Failed(error))
        elif request.locate_only:
            self._finish(running, "located")
        elif request.continuation is not None:
            self._finish(running, "scored")
        else:
            first, *rest = said(request).split(" ")
            sink(_spoken(request, first, 0))
            if verb != "hold":
                self._speak(running, rest)

    def cancel(self, request_id: str) -> None:
        with self._changed:
            self.cancelled.append(request_id)
            running = self._live.get(request_id)
            self._changed.notify_all()
        if running is not None:
            self._end(running, Failed(CancelledError("cancelled by the caller")))

    def release(self) -> None:
        """Let every held request go on."""
        for running in list(self._live.values()):
            self._speak(running, said(running.request).split(" ")[1:])

    def wait_live(self, count: int) -> None:
        """Block until so many requests are in flight."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._live) == count, PATIENCE_S), len(self._live)

    def wait_cancelled(self) -> None:
        """Block until `cancel` was called."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.cancelled, PATIENCE_S)

    def wait_refusing(self) -> None:
        """Block until a drain has begun."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._refusing is not None, PATIENCE_S)

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(
            generation=3,
            generations=(3,),
            tasks=("dates", "orders"),
            running=len(self._live),
            waiting=1,
            steps=2,
            tokens=3,
            drafted_tokens=5,
            accepted_tokens=4,
            kv_bytes_reserved=4,
            stall_s=0.5,
            prefix_hits=6,
            prefix_base_tokens=7,
            prefix_adapted_tokens=8,
            prefix_bytes=9,
            graphs=GraphCounts(replays=7, fallbacks=6, captures=5),
            memory=MEMORY,
        )

    def drain(self, grace_s: float) -> None:
        with self._changed:
            self._refusing = "draining"
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._live, grace_s)
        for running in list(self._live.values()):
            self._end(running, Failed(UnavailableError("the server stopped")))

    def close(self) -> None:
        self.closed += 1

    def _speak(self, running: Running, words: list[str]) -> None:
        for number, word in enumerate(words, start=1):
            running.sink(_spoken(running.request, f" {word}", number))
        for choice in range(1, running.request.sampling.n):
            running.sink(_spoken(running.request, f"choice {choice}", 9, choice))
        self._finish(running, "stop")

    def _finish(self, running: Running, reason: str) -> None:
        num_tokens = len(said(running.request).split(" "))
        usage = Usage(
            prompt_tokens=7, completion_tokens=num_tokens, queue_s=0.5, first_token_s=0.75, total_s=2.5, cached_tokens=4
        )
        words = (running.request.continuation or "").split()
        scored = tuple(Alternative(number, word, -0.5) for number, word in enumerate(words))
        explanation = (LayerWeights(layer=2, experts={DIGEST: 0.75}, groups={}),) if running.request.explain else ()
        others = (reason,) * (running.request.sampling.n - 1)
        end = Finished(reason=reason, usage=usage, other_reasons=others, explanation=explanation, scored=scored)  # type: ignore[arg-type]
        self._end(running, end)

    def _end(self, running: Running, event: Finished | Failed) -> None:
        with self._changed:
            if running.ended:
                return
            running.ended = True
            del self._live[running.request.request_id]
            self._changed.notify_all()
        running.sink(event)

    def _located(self, request: Request) -> Located:
        if request.base_only:
            return Located(task=None, how="base", margin=0.0, scores=(), generation=3, experts=())
        if request.task_weights:
            shares = request.named_tasks
            return Located(
                task=None, how="weighted", margin=0.0, scores=(), generation=3, experts=(), task_weights=shares
            )
        task = request.task or "orders"
        use = ExpertUse(digest=DIGEST, task=task, num_layers=4, source="disk", bytes_read=4096, load_s=0.25)
        return Located(
            task=task,
            how="pinned" if request.task else "located",
            margin=0.125,
            scores=() if request.task else (TaskScore("orders", 1.0), TaskScore("dates", 1.125)),
            generation=3,
            experts=() if request.locate_only else (use,),
        )


def _spoken(request: Request, text: str, token: int, choice: int = 0) -> TokenDelta:
    chosen = Alternative(token, text, -0.5)
    num_top = request.sampling.logprobs
    logprobs = () if num_top is None else (TokenLogprob(chosen, (chosen,) * min(1, num_top)),)
    return TokenDelta(text, (token,), choice, logprobs)


def said(request: Request) -> str:
    """The text, or what was said last in a chat."""
    return request.text or request.messages[-1].content
