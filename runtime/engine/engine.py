"""The engine: one thread that schedules, runs steps and hands out events; `submit` and `cancel` from any thread.

It knows nothing of gRPC or files; requests come in as `Request`, everything else leaves as events.
Read first: all state of sequences belongs to the engine thread. Other threads only put requests and cancellations into
`_inbox`; loader threads only wake it. Tokenising happens on the thread that submits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from runtime.engine.arrival import Arrival
from runtime.engine.casting import Casting
from runtime.engine.drafting import Drafting
from runtime.engine.generations import Generations
from runtime.engine.grammar import Grammars
from runtime.engine.guessing import Guessing
from runtime.engine.options import EngineOptions
from runtime.engine.passage import Passage
from runtime.engine.prefix import PrefixCache
from runtime.engine.request import Request
from runtime.engine.residents import Residents, make_memory
from runtime.engine.runner import StepRunner, make_cache
from runtime.engine.scheduler import Scheduler
from runtime.engine.sequence import Phase, Sequence, Sink
from runtime.engine.speaking import Speaking
from runtime.engine.statistics import EngineStatistics
from runtime.engine.step import Step
from runtime.engine.step_protocol import StepModel
from runtime.errors import (
    CancelledError,
    DeadlineError,
    GreenroomError,
    InvalidInputError,
    QueueFullError,
    UnavailableError,
)
from runtime.kernels.graph_capture import Capture
from runtime.memory.visible import VisibleSets
from runtime.model.base_tokenizer import BaseTokenizer
from runtime.model.generation import Generation
from runtime.model.repertoire import Repertoire

_log = logging.getLogger(__name__)


class Engine:
    """Answers requests from one generation of a repertoire.

    Args:
        model: fused weights of the base.
        tokenizer: of the base.
        eos_token_ids: tokens that end an answer.
        repertoire: where experts are read from.
        generation: the opened generation to begin with; see `publish`.
        retire: called once when that generation is no longer used.
        capture: records decode steps; see `runtime.engine.decode_graphs`.
        options: sizes and limits.

    It does nothing until `start`. For `pin`, `unpin`, `prefetch_task`, `evict` see `runtime.engine.residents`.
    """

    def __init__(
        self,
        model: StepModel,
        tokenizer: BaseTokenizer,
        eos_token_ids: tuple[int, ...],
        *,
        repertoire: Repertoire,
        generation: Generation,
        options: EngineOptions,
        retire: Callable[[], None] = lambda: None,
        capture: Capture | None = None,
    ) -> None:
        self.memory = make_memory(options, model, on_change=self._wake)
        self.visible = VisibleSets(
            repertoire, max_rank=options.max_rank, dtype=model.kv_dtype, inspector=model.inspector
        )
        residents = self._residents = Residents(self.memory, self.visible, current=lambda: self.generation)
        self.pin, self.unpin, self.prefetch_task = residents.pin, residents.unpin, residents.prefetch
        self.evict = residents.evict
        self._generations = Generations(generation, retire=retire, on_retire=residents.retired)
        self._options = options
        self._cache = make_cache(model, options, capture)
        first_layer = generation.manifest.first_layer
        self._drafting = Drafting(options.max_draft)
        self._runner = StepRunner(model, self._cache, self._drafting, first_layer=first_layer, capture=capture)

        def embed(ids: list[int]) -> torch.Tensor:
            return model.embed(torch.tensor(ids, dtype=torch.int64, device=model.device))

        self._casting = Casting(
            self.memory, self.visible, first_layer=first_layer, num_layers=len(model.layers), embed=embed
        )
        self._guessing = Guessing(self._casting.guess)
        self._prefixes = PrefixCache(
            self._cache, first_layer=first_layer, budget_bytes=options.prefix_budget_bytes, embed=embed
        )
        self._passage = Passage(self._casting, self._prefixes, num_layers=len(model.layers), embed=embed)
        self._arrival = Arrival(
            tokenizer,
            self._cache,
            Grammars(tokenizer, vocab_size=generation.manifest.base.vocab_size, eos_token_ids=eos_token_ids),
            max_context=min(options.max_context, model.max_context),
            max_choices=options.max_running,
        )
        self._scheduler = Scheduler(
            acquire_slot=self._acquire_slot,
            stage=self._casting.stage,
            layers_ready=self._passage.layers_ready,
            max_step_tokens=options.max_step_tokens,
            max_passes=options.max_passes,
            policy=options.policy,
            missing_bytes=self._casting.missing_bytes,
        )
        self._speaking = Speaking(self._cache, self._casting, eos_token_ids=eos_token_ids, join=self._scheduler.join)
        self._lock = threading.Condition()  # guards everything below, and is notified when any of it changes
        self._inbox: deque[Sequence] = deque()
        self._cancelled: set[str] = set()
        self._live: dict[str, Sequence] = {}
        self._awake = False
        self._refusing: str | None = "the engine has not started"
        self._stopping = False
        self._steps = self._tokens = 0
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    # ---- any thread

    def start(self) -> None:
        """Start the engine thread and accept requests."""
        with self._lock:
            self._refusing = None
        self._thread.start()
        self._guessing.start()

    @property
    def generation(self) -> Generation:
        """What new requests get."""
        return self._generations.current

    @property
    def accepting(self) -> bool:
        """Whether requests are taken now."""
        return self._refusing is None

    def publish(self, generation: Generation, *, retire: Callable[[], None] = lambda: None) -> None:
        """Serve another generation from now on; requests in flight keep the one they began with.

        Args:
            generation: opened.
            retire: called once when it has been replaced and its last request has ended, or the engine is closed.

        Raises:
            InvalidInputError: it cannot replace the current one in a running engine.
        """
        self._generations.publish(generation, retire=retire)
        self._residents.published(generation, self._generations.served())

    def submit(self, request: Request, sink: Sink) -> None:
        """Accept a request; its events reach `sink` on the engine thread, which `sink` must not block.

        Raises:
            InvalidInputError: the prompt is empty or too long, or the request id is in use.
            UnknownTaskError, RepertoireError: the pinned task does not exist or is quarantined.
            QueueFullError, BudgetError, DeadlineError, UnavailableError.
        """
        self._check_accepting()
        generation = self._generations.enter()
        try:
            sequence = self._arrival.sequence(request, generation, sink)
            for choice in sequence.choices:
                choice.on_end = self._give_back
            self._take(sequence)
        except BaseException:
            self._generations.leave(generation)
            raise
        self._wake()
        if self._options.prefetch:
            self._guessing.add(sequence)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What this thread submits within the block begins in the same step; nothing else goes on meanwhile."""
        with self._lock:  # which its holder may take again
            yield

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait on a condition that loads and ended requests can make true; `close` ends the wait too."""
        with self._lock:
            self._lock.wait_for(lambda: condition() or self._stopping)

    def _check_accepting(self) -> None:
        if self._refusing is not None:
            raise UnavailableError(self._refusing)

    def _take(self, sequence: Sequence) -> None:
        request_id = sequence.request.request_id
        with self._lock:
            self._check_accepting()
            if len(self._live) >= self._options.max_running + self._options.max_waiting:
                raise QueueFullError(f"{len(self._live)} requests are in flight, which is all that may be")
            if request_id in self._live:
                raise InvalidInputError("request_id", request_id, "is in use by a request in flight")
            self._live[request_id] = sequence
            self._inbox.append(sequence)

    def cancel(self, request_id: str) -> None:
        """End a request with CancelledError; unknown ids are ignored, since it may just have ended by itself."""
        with self._lock:
            if request_id in self._live:
                self._cancelled.add(request_id)
        self._wake()

    def statistics(self) -> EngineStatistics:
        """A snapshot."""
        manifest = self.generation.manifest
        with self._lock:
            running = sum(sequence.phase is not Phase.ENDED for sequence in tuple(self._scheduler.running))
            return EngineStatistics(
                generation=manifest.generation,
                generations=self._generations.numbers(),
                tasks=manifest.task_names(),
                running=running,
                waiting=max(0, len(self._live) - running),
                steps=self._steps,
                tokens=self._tokens,
                drafted_tokens=self._drafting.drafted,
                accepted_tokens=self._drafting.accepted,
                kv_bytes_reserved=self._cache.reserved_bytes,
                stall_s=self._casting.stall_s,
                memory=self.memory.statistics(),
                graphs=self._runner.graph_counts(),
                **self._prefixes.statistics(),
            )

    def drain(self, grace_s: float) -> None:
        """Refuse new requests, wait up to `grace_s` seconds for those in flight, then fail the rest."""
        with self._lock:
            self._refusing = self._refusing or "the server is draining"
            self._lock.wait_for(lambda: not self._live, timeout=grace_s)
        self.close()

    def close(self) -> None:
        """Stop the engine thread; requests in flight end with UnavailableError."""
        with self._lock:
            self._refusing = self._refusing or "the engine is closed"
            self._stopping = True
            self._lock.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._guessing.close()
        self._residents.close()
        self.memory.close()
        self._generations.close()

    def check_integrity(self) -> None:
        """Assert that an idle engine holds nothing; call it only while no request is in flight."""
        assert not self._live, f"requests in flight: {list(self._live)}"
        self.memory.check_integrity()
        assert self.memory.statistics().reserved_bytes == 0, "expert reservations leaked"
        self._cache.check_integrity()
        self._prefixes.check_integrity()
        assert self._cache.reserved_bytes == 0, "KV slots leaked"

    def _wake(self) -> None:
        with self._lock:
            self._awake = True
            self._lock.notify_all()

    # ---- the engine thread

    def _loop(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._awake or self._stopping, timeout=self._patience())
                if self._stopping:
                    break
                self._awake = False
                while self._inbox:
                    self._scheduler.add(self._inbox.popleft())
                cancelled, self._cancelled = self._cancelled, set()
            try:
                self._work(cancelled)
            except Exception:  # noqa: BLE001 - a defect fails what is in flight, not the server
                _log.exception("a step failed")
                self._fail_all(GreenroomError("the engine failed while computing this request"))
        self._fail_all(UnavailableError("the server stopped before the answer was complete"))

    def _patience(self) -> float | None:
        """Seconds until the earliest deadline of those in flight; None where nobody has one."""
        deadlines = [s.request.deadline for s in self._live.values() if s.request.deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _work(self, cancelled: set[str]) -> None:
        now = time.monotonic()
        for sequence in self._scheduler.all():
            if sequence.request.request_id in cancelled:
                sequence.fail(CancelledError("cancelled by the caller"))
            elif sequence.request.deadline is not None and sequence.request.deadline <= now:
                sequence.fail(DeadlineError("the deadline passed before the answer was complete"))
            else:
                self._casting.check(sequence)
        self._scheduler.sweep()
        step = self._scheduler.schedule()
        if not step.empty:
            self._run(step)
        self._scheduler.sweep()
        if not step.empty:
            self._wake()

    def _run(self, step: Step) -> None:
        done, logits = self._runner.run(step)
        self._steps += 1
        self._passage.advance(step.prompts)
        self._tokens += self._speaking.speak(done, logits)

    def _acquire_slot(self, sequence: Sequence) -> bool:
        if not self._speaking.acquire_slots(sequence):
            return False
        self._passage.begin(sequence)
        return True

    def _give_back(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self._cache.release(sequence.slot)
            sequence.slot = None
        if any(choice.phase is not Phase.ENDED for choice in sequence.choices):
            return
        self._generations.leave(sequence.generation)
        with self._lock:
            del self._live[sequence.request.request_id]
            self._cancelled.discard(sequence.request.request_id)
            self._awake = True  # what it held may be what others wait for
            self._lock.notify_all()

    def _fail_all(self, error: GreenroomError) -> None:
        with self._lock:
            remaining = list(self._live.values())
            self._inbox.clear()
        for sequence in remaining:
            sequence.fail(error)
        self._scheduler.sweep()
