"""Steps in which all sequences decode, recorded once per size and replayed: one launch instead of hundreds.

It knows nothing of devices: what records is passed in (`runtime.kernels.graph_capture`).
Read first: it is the same step as without recording, on buffers that stay where they are: tokens, slots, positions and
rows of mixtures in one tensor, packed layers in seats (`runtime.engine.static_stage`), keys and values in the cache.
Rows that only fill up a step are plain base tokens in the cache's spare slot 0, which no sequence gets. A recording is
found by the step's size, the context that it looks at and the version of every seat; one whose seat has moved is
dropped. Where an answer is to be explained, the routers' weights are kept beside the seats and read after the replay.
Not recorded, and run as ever: steps with prompts or drafts, and with hyper-adapters (which choose tokens by value).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import torch

from runtime.engine.attention import StaticPlan
from runtime.engine.explain import RouteWatch
from runtime.engine.kv import KVCache
from runtime.engine.llama import MixtureRows
from runtime.engine.sequence import Sequence
from runtime.engine.stage import FetchExpert, LayerPacks, Stage
from runtime.engine.static_room import rounded
from runtime.engine.static_stage import StaticPacks
from runtime.engine.statistics import GraphCounts
from runtime.engine.step_protocol import StepModel
from runtime.errors import UnsupportedDeviceError
from runtime.kernels.graph_capture import Capture, Captured
from runtime.model.mixture import Mixture

_log = logging.getLogger(__name__)

SPARE_SLOTS = 1
"""Slots that the cache keeps for rows that only fill up a step."""

_LEAST_CONTEXT = 128


@dataclass(frozen=True)
class _Key:
    size: int
    context: int
    explained: bool
    seats: tuple[tuple[int, int], ...]  # layer, version


class _KeptWeights(RouteWatch):
    """Keeps all weights of a step where its layers' seats have room for them."""

    def __init__(self, packs: StaticPacks) -> None:
        super().__init__({})
        self._packs = packs

    def note(self, layer: int, weights: torch.Tensor) -> None:
        """Keep a layer's weights [T, C]."""
        self._packs.weights(layer)[: len(weights)].copy_(weights)


class DecodeGraphs:
    """Runs steps in which all sequences decode.

    Args:
        model: `recordable`.
        cache: with `SPARE_SLOTS`.
        packs: of the engine.
        capture: records.
        max_recorded: recordings at most; the one that was replayed longest ago goes first.
        max_bytes: where recordings hold this much, no more are made until some become void.
    """

    def __init__(
        self,
        model: StepModel,
        cache: KVCache,
        packs: LayerPacks,
        capture: Capture,
        *,
        max_recorded: int = 32,
        max_bytes: int = 512 << 20,
    ) -> None:
        assert cache.spare >= SPARE_SLOTS, "rows that fill up a step have a slot of their own"
        self._model, self._cache, self._capture = model, cache, capture
        self._packs = StaticPacks(packs, num_rows=cache.num_slots)
        self._recorded: OrderedDict[_Key, Captured] = OrderedDict()
        self._inputs = torch.zeros(4, cache.num_slots, dtype=torch.int64, device=model.device)
        self._logits = torch.zeros(cache.num_slots, len(model.embedding), device=model.device)
        self._max_recorded, self._max_bytes = max_recorded, max_bytes
        self._refused = False
        self.counts = GraphCounts()

    def run(self, sequences: Items[Sequence], mixtures: Items[tuple[Mixture, FetchExpert]]) -> torch.Tensor | None:
        """One more token of each sequence.

        Returns:
            logits [B, V] float32, a new tensor; None where this step is to run as without recording.
        """
        if self._refused or any(mixture.hyper for mixture, _ in mixtures):
            self.pass_by()
            return None
        stage = Stage(mixtures, self._packs)
        layers = stage.layers = dict(stage.layers)  # every seat is filled now, and asked for no more
        slots = [sequence.held_slot for sequence in sequences]
        size = min(rounded(max(slots), least=1), self._cache.num_slots)
        longest = 1 + max(sequence.position for sequence in sequences)
        context = min(rounded(longest, least=_LEAST_CONTEXT), self._cache.shape.context)
        rows = [stage.row(sequence.mixture) for sequence in sequences]
        told = {i: (each.explanation, rows[i]) for i, each in enumerate(sequences) if each.request.explain}
        key = _Key(size, context, bool(told), tuple((layer, self._packs.version(layer)) for layer in layers))
        tokens = [sequence.output[-1] for sequence in sequences]
        spare = [0] * (size - len(rows))
        columns = (tokens, slots, [sequence.position for sequence in sequences], rows)
        pinned = self._model.device.type == "cuda"
        new = torch.tensor([column + spare for column in columns], dtype=torch.int64, pin_memory=pinned)
        self._inputs[:, :size].copy_(new, non_blocking=True)
        recorded = self._recorded.get(key) or self._record(key, self._step(key, stage if layers else None))
        if recorded is None:
            self.pass_by()
            return None
        self._recorded.move_to_end(key)
        recorded.replay()
        self.counts = replace(self.counts, replays=self.counts.replays + 1)
        if told:
            watch = RouteWatch(told)
            for layer in layers:
                watch.note(layer, self._packs.weights(layer))
            watch.tell(Stage(mixtures, self._packs.packs))
        return self._logits[: len(rows)].clone()

    def pass_by(self) -> None:
        """Count a step that runs as without recording."""
        self.counts = replace(self.counts, fallbacks=self.counts.fallbacks + 1)

    def _step(self, key: _Key, stage: Stage | None) -> Callable[[], None]:
        """What is recorded: it reads and writes buffers only, and may be run again."""
        model, cache, size = self._model, self._cache, key.size
        watch = _KeptWeights(self._packs) if key.explained else None
        ids, slots, positions, rows = self._inputs[:, :size]
        logits = self._logits[:size]

        def run() -> None:
            hidden = model.embed(ids, positions)
            plan = StaticPlan(slots, positions, span=SPARE_SLOTS + size, context=key.context)
            mixtures = MixtureRows(stage, rows, watch) if stage else None
            model.run_layers(hidden, range(len(model.layers)), plan, cache, mixtures)
            logits.copy_(model.logits(hidden))

        return run

    def _record(self, key: _Key, run: Callable[[], None]) -> Captured | None:
        current = dict(key.seats)
        for other in [each for each in self._recorded if any(current.get(at, seat) != seat for at, seat in each.seats)]:
            del self._recorded[other]
        if sum(each.num_bytes for each in self._recorded.values()) >= self._max_bytes:
            return None
        try:
            made = self._capture(run)
        except UnsupportedDeviceError as error:
            _log.warning("decode steps are not recorded from now on: %s", error)
            self._refused = True
            self._recorded.clear()
            return None
        self.counts = replace(self.counts, captures=self.counts.captures + 1)
        self._recorded[key] = made
        if len(self._recorded) > self._max_recorded:
            self._recorded.popitem(last=False)
        return made
