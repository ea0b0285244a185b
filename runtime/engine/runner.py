"""Runs one step's tokens through the model.

It knows nothing of queues, events or loading; it gets a `Step`, whose prompt parts enter only layers that are ready.
Read first: decoding tokens go through all layers, each prompt part through its own range. The step is cut at the
borders of these ranges; between two borders everything that is under way runs as one flat list of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import pairwise

import torch

from runtime.engine.attention import AttentionPlan, Segment
from runtime.engine.decode_graphs import SPARE_SLOTS, DecodeGraphs
from runtime.engine.drafting import Drafting
from runtime.engine.explain import RouteWatch
from runtime.engine.kv import KVCache
from runtime.engine.llama import MixtureRows
from runtime.engine.options import EngineOptions
from runtime.engine.scoring import score_part
from runtime.engine.sequence import Sequence
from runtime.engine.stage import FetchExpert, LayerPacks, Stage
from runtime.engine.statistics import GraphCounts
from runtime.engine.step import PromptPart, Step
from runtime.engine.step_protocol import StepModel
from runtime.kernels.graph_capture import Capture
from runtime.model.mixture import Mixture


@dataclass
class _Flow:
    """Tokens that go through `layers` together: all that decode, one that decodes with its draft, or a prompt part."""

    layers: range
    hidden: torch.Tensor  # [T, D]
    sequences: tuple[Sequence, ...]  # T of them, or one for all
    part: PromptPart | None = None
    draft: tuple[int, ...] = ()

    @property
    def in_a_row(self) -> bool:
        """The tokens are of one sequence, one after the other."""
        return self.part is not None or bool(self.draft)

    def owners(self) -> tuple[Sequence, ...]:
        """The sequence of each token."""
        return self.sequences * len(self.hidden) if self.in_a_row else self.sequences

    def segment(self) -> Segment:
        """Where the tokens of a prompt part or of a draft lie."""
        (sequence,) = self.sequences
        start = sequence.position if self.part is None else self.part.start
        return Segment(sequence.held_slot, start, len(self.hidden))

    def answering(self) -> list[bool]:
        """Of each token whether a token of the answer comes of it: all that decode, and the last of a prompt."""
        if self.part is None:
            return [True] * len(self.hidden)
        places = range(self.part.start, self.part.start + self.part.length)
        return [place in self.part.sequence.answering for place in places]


def make_cache(model: StepModel, options: EngineOptions, capture: Capture | None) -> KVCache:
    """The KV cache of an engine whose steps may be recorded by `capture`."""
    return KVCache(
        model.kv_shape(),
        num_slots=options.max_running,
        budget_bytes=options.kv_budget_bytes,
        dtype=model.kv_dtype,
        device=model.device,
        spare=SPARE_SLOTS if capture and model.recordable else 0,
    )


class StepRunner:
    """The tensor side of the engine.

    Args:
        model: the weights.
        cache: KV cache of the engine.
        drafting: tokens that are tried ahead.
        first_layer: the first layer with experts.
        capture: records steps in which all sequences decode, where the model can be recorded; None records none.
    """

    def __init__(
        self,
        model: StepModel,
        cache: KVCache,
        drafting: Drafting,
        *,
        first_layer: int,
        capture: Capture | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._drafting = drafting
        self._first_layer = first_layer
        self._packs = LayerPacks(dtype=model.dtype, device=model.device)
        self._graphs = DecodeGraphs(model, cache, self._packs, capture) if capture and model.recordable else None

    def graph_counts(self) -> GraphCounts:
        """What became of the steps in which all sequences decoded, as far as steps are recorded."""
        return self._graphs.counts if self._graphs else GraphCounts()

    @torch.inference_mode()
    def run(self, step: Step) -> tuple[list[Sequence], torch.Tensor]:
        """Run a step; advances the sequences of prompt parts and changes their `residual`.

        Returns:
            every decoding sequence, as often as it got a token, and every prompt that is now complete, B of them, and
            their logits [B, V] float32.
        """
        drafts = self._drafting.propose(step.decode)
        if self._graphs and drafts and not step.prompts:
            self._graphs.pass_by()
        elif self._graphs and not step.prompts:
            logits = self._graphs.run(step.decode, _mixtures(step.decode))
            if logits is not None:
                return list(step.decode), logits
        flows = self._decode_flows(step.decode, drafts)
        flows += [self._prompt_flow(part) for part in step.prompts]
        borders = sorted({border for flow in flows for border in (flow.layers.start, flow.layers.stop)})
        for start, stop in pairwise(borders):
            self._run_range(range(start, stop), [flow for flow in flows if start in flow.layers])
        owners = (sequence for flow in flows for sequence in flow.sequences)
        self._model.forget(frozenset(each.mixture.digest for each in owners if each.mixture is not None))
        return self._finish(flows)

    def _decode_flows(self, sequences: tuple[Sequence, ...], drafts: Mapping[Sequence, list[int]]) -> list[_Flow]:
        layers = range(len(self._model.layers))
        plain = tuple(sequence for sequence in sequences if sequence not in drafts)
        flows = []
        if plain:
            hidden = self._embed([each.output[-1] for each in plain], [each.position for each in plain])
            flows.append(_Flow(layers, hidden, plain))
        for sequence, draft in drafts.items():
            places = range(sequence.position, sequence.position + 1 + len(draft))
            hidden = self._embed([sequence.output[-1], *draft], places)
            flows.append(_Flow(layers, hidden, (sequence,), draft=tuple(draft)))
        return flows

    def _prompt_flow(self, part: PromptPart) -> _Flow:
        sequence = part.sequence
        if sequence.residual is None:
            sequence.residual = self._embed(sequence.prompt, range(len(sequence.prompt)))
        return _Flow(part.layers, sequence.residual[part.start : part.start + part.length], (sequence,), part)

    def _embed(self, tokens: list[int], positions: Items[int]) -> torch.Tensor:
        ids, places = (torch.tensor(each, dtype=torch.int64, device=self._model.device) for each in (tokens, positions))
        return self._model.embed(ids, places)

    def _run_range(self, layers: range, flows: list[_Flow]) -> None:
        if not flows:
            return
        decoding = [(each.held_slot, each.position) for flow in flows if not flow.in_a_row for each in flow.sequences]
        segments = [flow.segment() for flow in flows if flow.in_a_row]
        hidden = torch.cat([flow.hidden for flow in flows]) if len(flows) > 1 else flows[0].hidden
        mixtures = self._mixtures(flows) if layers.stop > self._first_layer else None
        plan = AttentionPlan(decoding, segments, self._model.device)
        self._model.run_layers(hidden, layers, plan, self._cache, mixtures)
        if mixtures is not None and mixtures.watch is not None:
            mixtures.watch.tell(mixtures.stage)
        if len(flows) > 1:
            begin = 0
            for flow in flows:
                flow.hidden = hidden[begin : begin + len(flow.hidden)]
                begin += len(flow.hidden)

    def _mixtures(self, flows: list[_Flow]) -> MixtureRows:
        stage = Stage(_mixtures([sequence for flow in flows for sequence in flow.sequences]), self._packs)
        owners = [sequence for flow in flows for sequence in flow.owners()]
        rows = [stage.row(sequence.mixture) for sequence in owners]
        answering = [answers for flow in flows for answers in flow.answering()]
        told = {
            token: (sequence.explanation, rows[token])
            for token, sequence in enumerate(owners)
            if sequence.request.explain and answering[token]
        }
        return MixtureRows(stage, torch.tensor(rows, device=self._model.device), RouteWatch(told) if told else None)

    def _finish(self, flows: list[_Flow]) -> tuple[list[Sequence], torch.Tensor]:
        ended: list[Sequence] = []
        rows: list[torch.Tensor] = []  # [*, D] each
        for flow in flows:
            if flow.part is None:
                ended += flow.owners()
                rows.append(flow.hidden)
                continue
            sequence, part = flow.part.sequence, flow.part
            assert sequence.residual is not None, "a prompt under way has a residual stream"
            done = sequence.advance(part.length)
            if part.layers.stop < len(self._model.layers):
                sequence.residual[part.start : part.start + part.length] = flow.hidden
                continue
            if sequence.request.continuation is not None:
                score_part(self._model, sequence, part.start, flow.hidden)
            if done:
                sequence.residual = None
                ended.append(sequence)
                rows.append(flow.hidden[-1:])
        if not ended:
            return [], self._model.embedding[:0]
        logits = self._model.logits(torch.cat(rows) if len(rows) > 1 else rows[0])
        drafts = {flow.sequences[0]: flow.draft for flow in flows if flow.draft}
        return self._judge(ended, logits, drafts) if drafts else (ended, logits)

    def _judge(
        self, sequences: list[Sequence], logits: torch.Tensor, drafts: dict[Sequence, tuple[int, ...]]
    ) -> tuple[list[Sequence], torch.Tensor]:
        """Keep of every draft's rows those that follow a token which held, and all other rows."""
        kept: list[int] = []
        row = 0
        while row < len(sequences):
            draft = drafts.get(sequences[row], ())
            best = logits[row : row + len(draft)].argmax(1).tolist()
            held = self._drafting.judge(sequences[row], draft, best) if draft else 0
            kept += range(row, row + held + 1)
            row += len(draft) + 1
        return [sequences[row] for row in kept], logits[kept]


def _mixtures(sequences: Items[Sequence]) -> list[tuple[Mixture, FetchExpert]]:
    """The mixtures of sequences, each once, with the way to its experts.

    Ordered by task name, so that the same batch is packed alike in every generation that holds its tasks.
    """
    needed: dict[str, tuple[Mixture, Sequence]] = {}
    for sequence in sequences:
        if sequence.mixture is not None:
            needed.setdefault(sequence.mixture.digest, (sequence.mixture, sequence))
    mixtures: list[tuple[Mixture, FetchExpert]] = []
    for mixture, sequence in sorted(needed.values(), key=lambda pair: (pair[0].task, pair[0].variant)):
        assert sequence.reservation is not None, "a sequence in the expert layers holds its experts"
        mixtures.append((mixture, sequence.reservation.expert))
    return mixtures
