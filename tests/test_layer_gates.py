"""Layer l of a prompt waits for its own experts only; what runs meanwhile is not held up."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from engines import ask
from repertoires import FIRST_LAYER, Workshop

import runtime.memory.memory
from runtime.engine.attention import AttentionPlan
from runtime.engine.engine import Engine
from runtime.engine.kv import KVCache
from runtime.engine.llama import LlamaModel, MixtureRows
from runtime.errors import DigestMismatchError
from runtime.kernels.inspection import Inspected
from runtime.model.expert import Expert, UnitForm
from runtime.model.manifest import BaseRef, ExpertSet, Unit
from runtime.model.repertoire import Repertoire

MakeEngine = Callable[..., Engine]
NUM_LAYERS = 4


class GatedRepertoire(Repertoire):
    """Reads of one layer of one task wait for `gate`, and then fail if `bad`."""

    def __init__(self, repertoire: Repertoire, task: str, layer: int) -> None:
        super().__init__(repertoire.root)
        self.slow = (task, layer)
        self.gate = threading.Event()
        self.bad = False

    def read_unit(
        self,
        entry: ExpertSet,
        unit: Unit,
        base: BaseRef,
        *,
        data: Inspected | None = None,
        form: UnitForm | None = None,
    ) -> Expert:
        if (entry.task, unit.layer) == self.slow:
            assert self.gate.wait(30)
            if self.bad:
                raise DigestMismatchError("the slow one is bad")
        return super().read_unit(entry, unit, base, data=data, form=form)


class RecordingModel(LlamaModel):
    """Remembers which layers prompts entered, and lets a test wait for one."""

    def __init__(self, *args: object, **fields: object) -> None:
        super().__init__(*args, **fields)  # type: ignore[arg-type]
        self.ranges: list[range] = []
        self.changed = threading.Condition()

    def run_layers(
        self, hidden: torch.Tensor, layers: range, plan: AttentionPlan, cache: KVCache, mixtures: MixtureRows | None
    ) -> None:
        super().run_layers(hidden, layers, plan, cache, mixtures)
        if plan.segments:
            with self.changed:
                self.ranges.append(layers)
                self.changed.notify_all()

    def wait_for(self, layer: int) -> None:
        """Until some prompt has passed the layers before `layer`."""
        with self.changed:
            assert self.changed.wait_for(lambda: any(seen.stop == layer for seen in self.ranges), timeout=30)


@pytest.fixture(autouse=True)
def _layers_are_read_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.memory.memory, "_RUN_BYTES", 1)
    monkeypatch.setattr(runtime.memory.memory, "_RUN_UNITS", 1)


def gated_engine(
    workshop: Workshop, make_engine: MakeEngine, layer: int
) -> tuple[Engine, RecordingModel, GatedRepertoire]:
    repertoire = GatedRepertoire(workshop.repertoire, "red", layer)
    engine = make_engine(workshop, 1, model_class=RecordingModel, repertoire=repertoire, num_loaders=2)
    model = engine._runner._model
    assert isinstance(model, RecordingModel)
    return engine, model, repertoire


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "located"])
@pytest.mark.parametrize("layer", [FIRST_LAYER, FIRST_LAYER + 1])
def test_a_prompt_passes_the_layers_whose_experts_are_there_and_stops_before_the_first_that_lacks_one(
    three_tasks: Workshop, make_engine: MakeEngine, prototypes: dict[str, str], layer: int, *, pinned: bool
) -> None:
    engine, model, repertoire = gated_engine(three_tasks, make_engine, layer)
    answer = ask(engine, prototypes["red"], task="red" if pinned else None, max_tokens=3)
    model.wait_for(layer)
    assert max(seen.stop for seen in model.ranges) == layer
    other = ask(engine, "free", base_only=True, max_tokens=3).wait()
    assert len(other.tokens) == 3, "a prompt that needs no experts is not held up"
    assert not answer.ended.is_set()
    repertoire.gate.set()
    expected = three_tasks.reference(prototypes["red"], "red", 3, number=1)
    torch.testing.assert_close(answer.wait().logits(expected.shape[1]), expected, atol=2e-4, rtol=1e-3)
    assert engine.statistics().stall_s > 0


def test_a_prompt_between_two_layers_fails_when_the_next_experts_are_bad_and_gives_everything_back(
    three_tasks: Workshop, make_engine: MakeEngine, prototypes: dict[str, str]
) -> None:
    engine, model, repertoire = gated_engine(three_tasks, make_engine, FIRST_LAYER + 1)
    repertoire.bad = True
    answer = ask(engine, prototypes["red"], task="red")
    model.wait_for(FIRST_LAYER + 1)
    repertoire.gate.set()
    assert isinstance(answer.wait().error, DigestMismatchError)
    assert engine.memory.statistics().reserved_bytes == 0
    engine.memory.check_integrity()


def test_a_running_answer_goes_on_while_a_prompt_waits_between_layers(
    three_tasks: Workshop, make_engine: MakeEngine, prototypes: dict[str, str]
) -> None:
    engine, model, repertoire = gated_engine(three_tasks, make_engine, FIRST_LAYER + 1)
    running = ask(engine, "free", base_only=True, max_tokens=40)
    waiting = ask(engine, prototypes["red"], task="red", max_tokens=3)
    model.wait_for(FIRST_LAYER + 1)
    assert len(running.wait().tokens) == 40
    assert not waiting.ended.is_set()
    repertoire.gate.set()
    expected = three_tasks.reference(prototypes["red"], "red", 3, number=1)
    torch.testing.assert_close(waiting.wait().logits(expected.shape[1]), expected, atol=2e-4, rtol=1e-3)
