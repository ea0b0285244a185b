"""Runs one step's tokens through the model.

It knows nothing of queues, events or loading; it gets a `Step`, and every mixing or decoding sequence has its experts.
Read first: two passes. Below `first_layer` go the decoding tokens and the prompts in BASE; from there on the decoding
tokens and the prompts in MIXING. So base-only layers never wait for experts.
"""

from __future__ import annotations

import torch

from runtime.engine.attention import AttentionPlan, Segment
from runtime.engine.kv import KVCache
from runtime.engine.llama import LlamaModel, MixtureRows
from runtime.engine.scheduler import Step
from runtime.engine.sequence import Sequence
from runtime.engine.stage import Stage
from runtime.model.generation import Mixture


class StepRunner:
    """The tensor side of the engine.

    Args:
        model: fused weights.
        cache: KV cache of the engine.
        first_layer: the first layer with experts.
    """

    def __init__(self, model: LlamaModel, cache: KVCache, *, first_layer: int) -> None:
        self._model = model
        self._cache = cache
        self._lower = range(first_layer)
        self._upper = range(first_layer, len(model.layers))
        self._stage = Stage([], dtype=model.dtype, device=model.device)

    @torch.inference_mode()
    def run(self, step: Step) -> list[tuple[Sequence, torch.Tensor]]:
        """Run a step; advances `base_done` and `mixed_done`, appends to `residual`.

        Returns:
            (sequence, logits [V] float32) of every decoding sequence and of every prompt that is now complete.
        """
        decoding = [(_slot(sequence), sequence.position) for sequence in step.decode]
        tokens = [sequence.output[-1] for sequence in step.decode]
        segments = []
        for sequence, length in step.base:
            tokens += sequence.prompt[sequence.base_done : sequence.base_done + length]
            segments.append(Segment(_slot(sequence), sequence.base_done, length))
        hidden = self._model.embed(torch.tensor(tokens, dtype=torch.int64, device=self._model.device))
        if tokens:
            plan = AttentionPlan(decoding, segments, self._model.device)
            self._model.run_layers(hidden, self._lower, plan, self._cache, None)
        begin = len(decoding)
        for sequence, length in step.base:
            sequence.residual.append(hidden[begin : begin + length].clone())
            sequence.base_done += length
            begin += length
        return self._run_upper(step, hidden[: len(decoding)], decoding)

    def _run_upper(
        self, step: Step, decode_hidden: torch.Tensor, decoding: list[tuple[int, int]]
    ) -> list[tuple[Sequence, torch.Tensor]]:
        if not (step.decode or step.mixing):
            return []
        parts, segments = [decode_hidden], []
        owners = list(step.decode)
        ready = list(range(len(decoding)))
        done = list(step.decode)
        for sequence, length in step.mixing:
            start = sequence.mixed_done
            parts.append(sequence.residual[0][start : start + length])
            segments.append(Segment(_slot(sequence), start, length))
            owners += [sequence] * length
            sequence.mixed_done += length
            if sequence.mixed_done == len(sequence.prompt):
                sequence.residual.clear()
                ready.append(len(owners) - 1)
                done.append(sequence)
        hidden = torch.cat(parts)
        stage = self._staged([*step.decode, *(sequence for sequence, _ in step.mixing)])
        rows = torch.tensor([stage.row(sequence.mixture) for sequence in owners], device=self._model.device)
        plan = AttentionPlan(decoding, segments, self._model.device)
        self._model.run_layers(hidden, self._upper, plan, self._cache, MixtureRows(stage, rows))
        if not ready:
            return []
        return list(zip(done, self._model.logits(hidden[ready]), strict=True))

    def _staged(self, sequences: list[Sequence]) -> Stage:
        """The stage for exactly these sequences' mixtures; kept while the set stays the same."""
        needed: dict[str, tuple[Mixture, Sequence]] = {}
        for sequence in sequences:
            if sequence.mixture is not None:
                needed.setdefault(sequence.mixture.digest, (sequence.mixture, sequence))
        if needed.keys() != self._stage.rows.keys():
            # Ordered by task name, so that the same batch is packed alike in every generation that holds its tasks.
            chosen = sorted(needed.values(), key=lambda pair: pair[0].task)
            mixtures = []
            for mixture, sequence in chosen:
                assert sequence.reservation is not None, "a mixing sequence holds its experts"
                mixtures.append((mixture, sequence.reservation.expert))
            self._stage = Stage(mixtures, dtype=self._model.dtype, device=self._model.device)
        return self._stage


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None, "a running sequence holds a slot"
    return sequence.slot
