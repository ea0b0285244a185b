"""A pytest plugin: engines on the tiny base, and a way to ask them and wait.

It does not know gRPC.
Read first: engines made here are closed, and checked for leaks, when the test ends.
"""

from __future__ import annotations

import copy
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from repertoires import Workshop

from runtime.engine.engine import Engine
from runtime.engine.llama import LlamaModel
from runtime.engine.options import EngineOptions
from runtime.engine.request import Event, Failed, Finished, Located, Request, SamplingParams, TokenDelta
from runtime.kernels.graph_capture import Capture
from runtime.model.generation import Generation, open_generation
from runtime.model.repertoire import Repertoire

_ids = itertools.count()


@dataclass
class Answer:
    """Collects the events of one request."""

    request_id: str
    events: list[Event] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    began: threading.Event = field(default_factory=threading.Event)
    on_begin: Callable[[], object] = lambda: None
    on_end: Callable[[], object] = lambda: None

    def sink(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, TokenDelta):
            self.began.set()
        if isinstance(event, Located):
            self.on_begin()
        if isinstance(event, Finished | Failed):
            self.began.set()
            self.on_end()
            self.ended.set()

    def wait(self) -> Answer:
        assert self.ended.wait(60), "the request did not end"
        return self

    @property
    def error(self) -> Exception | None:
        return self.events[-1].error if isinstance(self.events[-1], Failed) else None

    @property
    def finished(self) -> Finished:
        assert isinstance(self.events[-1], Finished), self.events[-1]
        return self.events[-1]

    @property
    def located(self) -> Located:
        return next(event for event in self.events if isinstance(event, Located))

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events if isinstance(event, TokenDelta) for token in event.token_ids]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, TokenDelta))

    def choice_tokens(self, choice: int) -> list[int]:
        deltas = [event for event in self.events if isinstance(event, TokenDelta) and event.choice == choice]
        return [token for delta in deltas for token in delta.token_ids]

    def choice_text(self, choice: int) -> str:
        deltas = [event for event in self.events if isinstance(event, TokenDelta) and event.choice == choice]
        return "".join(delta.text for delta in deltas)

    def logits(self, vocab_size: int) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(self.finished.logits, dtype=np.float32).copy()).view(-1, vocab_size)


def ask(engine: Engine, text: str, *, max_tokens: int = 8, sampling: dict | None = None, **fields: object) -> Answer:  # type: ignore[type-arg]
    """Submit a request that ignores the end token and keeps its logits, unless told otherwise."""
    params = SamplingParams(max_tokens=max_tokens, **{"ignore_eos": True, **(sampling or {})})
    answer = Answer(f"request-{next(_ids)}")
    engine.submit(
        Request(request_id=answer.request_id, text=text, sampling=params, **{"keep_logits": True, **fields}),  # type: ignore[arg-type]
        answer.sink,
    )
    return answer


def until(condition: Callable[[], bool], *, seconds: float = 30.0) -> None:
    """Wait for something that comes about on another thread."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    """Make engines: `make_engine(workshop, number=None, start=True, model_class=..., generation=..., capture=...,
    **options)`."""
    engines: list[Engine] = []

    def make(
        workshop: Workshop,
        number: int | None = None,
        *,
        start: bool = True,
        model_class: type[LlamaModel] = LlamaModel,
        repertoire: Repertoire | None = None,
        generation: Generation | None = None,
        capture: Capture | None = None,
        **options: int,
    ) -> Engine:
        base = workshop.base
        engine = Engine(
            model_class(copy.deepcopy(base.model), max_context=256),
            base.tokenizer,
            base.eos_token_ids,
            repertoire=repertoire or workshop.repertoire,
            generation=generation or open_generation(workshop.repertoire, number),
            options=EngineOptions(**options),
            capture=capture,
        )
        engines.append(engine)
        if start:
            engine.start()
        return engine

    yield make
    for engine in engines:
        engine.close()
        engine.check_integrity()
