"""Recorded decode steps: replayed on the same memory they answer as ever, whoever joins, leaves or changes the task."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import Answer, ask
from hyper_tasks import with_hyper
from recorded_steps import NotRecordableError, RecordedSteps, WrongReplayError
from repertoires import Workshop
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from runtime.engine.attention import AttentionPlan
from runtime.engine.decode_graphs import SPARE_SLOTS, DecodeGraphs
from runtime.engine.engine import Engine
from runtime.engine.kv import KVCache
from runtime.engine.llama import LlamaModel
from runtime.engine.stage import LayerPacks
from runtime.engine.statistics import GraphCounts
from runtime.errors import UnsupportedDeviceError
from runtime.kernels.graph_capture import Captured, CudaCapture, step_capture
from runtime.kernels.triton_mixture import Launch
from runtime.model.attach import fresh_expert
from runtime.model.blend import blended
from runtime.model.expert import Expert
from runtime.model.generation import base_ref, open_generation
from runtime.model.manifest import TARGETS
from runtime.model.mixture import Mixture

MakeEngine = Callable[..., Engine]
CPU = torch.device("cpu")
HALF = "x" * 118  # with the template's tokens it begins below 128 tokens and ends above
CROWD: list[dict[str, Any]] = [
    {"text": "abc", "task": "red", "max_tokens": 5},
    {"text": HALF, "task": "green", "max_tokens": 24},
    {"text": "? !", "task": "blue", "max_tokens": 12},
    {"text": "plain", "base_only": True, "max_tokens": 3},
    {"text": "abcd", "task": "red", "max_tokens": 7},
    {"text": "aa 12", "task_weights": {"red": 0.5, "blue": 0.5}, "max_tokens": 6},
    {"text": "x" * 9, "task": "blue", "max_tokens": 4},
    {"text": "plain too", "base_only": True, "max_tokens": 30},
]


@pytest.fixture
def kinds(workshop: Workshop) -> Workshop:
    """A router of every kind, ranks 3, 20 and 5, one task without experts in the last layer, two with attention."""
    workshop.publish("red", "aaaa", rank=3, targets=TARGETS, top_k=1)
    workshop.publish("green", "12 34", rank=20, kind="arrow", layers=[2])
    workshop.publish(
        "blue", "? !", rank=5, targets=TARGETS, grouping={"groups": ("one", "two", "two"), "scope": "token"}
    )
    return workshop


def ask_all(engine: Engine, crowd: list[dict[str, Any]]) -> list[Answer]:
    with engine.together():
        return [ask(engine, wish["text"], **{key: wish[key] for key in wish if key != "text"}) for wish in crowd]


def told(workshop: Workshop, answers: list[Answer]) -> list[tuple[list[int], torch.Tensor]]:
    return [(answer.wait().tokens, answer.logits(workshop.base.info.vocab_size)) for answer in answers]


def assert_alike(one: list[tuple[list[int], torch.Tensor]], other: list[tuple[list[int], torch.Tensor]]) -> None:
    for (tokens, expected), (others, got) in zip(one, other, strict=True):
        assert tokens == others
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_replayed_steps_answer_as_ever_while_sequences_join_leave_and_grow(
    kinds: Workshop, make_engine: MakeEngine
) -> None:
    recorded = RecordedSteps()  # which compares every replay with the step, bit for bit
    plain, replaying = make_engine(kinds, max_running=4), make_engine(kinds, max_running=4, capture=recorded)
    assert_alike(told(kinds, ask_all(plain, CROWD)), told(kinds, ask_all(replaying, CROWD)))
    counts = replaying.statistics().graphs
    assert counts.fallbacks == 0
    assert counts.replays == len(recorded.replays) > 2 * counts.captures
    assert counts.captures == len(recorded.recordings)
    assert plain.statistics().graphs == GraphCounts()


def test_a_long_run_of_random_requests_is_replayed_step_by_step(kinds: Workshop, make_engine: MakeEngine) -> None:
    chance = random.Random(0)
    crowd: list[dict[str, Any]] = []
    for _ in range(30):
        route = chance.choice([{"task": "red"}, {"task": "green"}, {"task": "blue"}, {"base_only": True}])
        crowd.append({"text": "y" * chance.randint(1, 150), "max_tokens": chance.randint(1, 40), **route})
    recorded = RecordedSteps()
    plain, replaying = make_engine(kinds, max_running=6), make_engine(kinds, max_running=6, capture=recorded)
    assert_alike(told(kinds, ask_all(plain, crowd)), told(kinds, ask_all(replaying, crowd)))
    assert replaying.statistics().graphs.fallbacks == 0
    assert len(recorded.replays) > 40


def cache_of(model: LlamaModel, *, num_slots: int) -> KVCache:
    """With room for as many tokens as there are places, and spare slots."""
    return KVCache(
        model.kv_shape(),
        num_slots=num_slots,
        budget_bytes=1 << 30,
        dtype=model.kv_dtype,
        device=model.device,
        spare=SPARE_SLOTS,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_every_base_of_our_own_step_is_recorded(config: Any, dtype: torch.dtype) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    torch.manual_seed(0)
    source = AutoModelForCausalLM.from_config(config(**sizes, **heads, initializer_range=0.2), dtype=dtype)
    model = LlamaModel(source, max_context=256)
    caches = [cache_of(model, num_slots=4) for _ in range(2)]
    layers, tokens = range(2), torch.randint(96, (3, 140)).tolist()
    with torch.inference_mode():
        graphs = DecodeGraphs(model, caches[0], LayerPacks(dtype=dtype, device=CPU), RecordedSteps())
        for position in range(140):
            now = [row[position] for row in tokens]
            hidden = model.embed(torch.tensor(now))
            plan = AttentionPlan([(slot, position) for slot in (2, 1, 4)], [], CPU)
            model.run_layers(hidden, layers, plan, caches[1], None)
            expected = model.logits(hidden)
            speakers = [Speaker(slot, position, [token]) for slot, token in zip((2, 1, 4), now, strict=True)]
            got = run(graphs, *speakers)
            close = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 0.1, "atol": 0.5}
            torch.testing.assert_close(got, expected, **close)
    assert graphs.counts == GraphCounts(replays=140, captures=2)


def test_tasks_take_turns_in_the_same_recording(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    recorded = RecordedSteps()
    plain, replaying = make_engine(three_tasks), make_engine(three_tasks, capture=recorded)
    for task in ("blue", "red", "green", "blue"):
        crowd = [{"text": "abc", "task": task, "max_tokens": 4}]
        assert_alike(told(three_tasks, ask_all(plain, crowd)), told(three_tasks, ask_all(replaying, crowd)))
    assert len(recorded.recordings) == 1
    assert len(recorded.replays) == 4 * 3


def test_the_kernels_are_part_of_what_is_recorded(kinds: Workshop, make_engine: MakeEngine) -> None:
    recorded = RecordedSteps()
    plain = make_engine(kinds)
    model = partial(LlamaModel, launch=recorded.launch)
    replaying = make_engine(kinds, capture=recorded, model_class=model)
    crowd = [{**wish, "max_tokens": 3, "text": wish["text"][:1]} for wish in (CROWD[1], CROWD[2], CROWD[5])]
    assert_alike(told(kinds, ask_all(plain, crowd)), told(kinds, ask_all(replaying, crowd)))
    assert recorded.replays
    assert all(each.names["decode_shrink"] == each.names["decode_expand"] for each in recorded.recordings)
    assert any(each.names["decode_shrink"] for each in recorded.recordings)


def test_more_tokens_than_the_decode_kernels_take_run_through_the_grouped_ones(
    three_tasks: Workshop, make_engine: MakeEngine
) -> None:
    recorded = RecordedSteps()
    plain = make_engine(three_tasks, max_running=20)
    model = partial(LlamaModel, launch=recorded.launch)
    replaying = make_engine(three_tasks, capture=recorded, model_class=model, max_running=20)
    crowd = [{"text": "abc"[: 1 + i % 3], "task": ("red", "green", "blue")[i % 3], "max_tokens": 2} for i in range(18)]
    assert_alike(told(three_tasks, ask_all(plain, crowd)), told(three_tasks, ask_all(replaying, crowd)))
    assert any(each.names["grouped_expand"] for each in recorded.replays)


def test_a_new_generation_is_served_from_recordings_of_the_old(workshop: Workshop, make_engine: MakeEngine) -> None:
    workshop.publish("red", "aaaa", top_k=1)
    recorded = RecordedSteps()
    engine = make_engine(workshop, capture=recorded)
    ask(engine, "abc", task="red", max_tokens=4).wait()
    workshop.publish("green", "12 34", top_k=1)
    engine.publish(open_generation(workshop.repertoire))
    answer = ask(engine, "abc", task="green", max_tokens=4)
    expected = workshop.reference("abc", "green", 4)
    torch.testing.assert_close(told(workshop, [answer])[0][1], expected, rtol=1e-4, atol=1e-4)
    assert len(recorded.recordings) == 1


def test_what_needs_more_room_makes_recordings_void(workshop: Workshop, make_engine: MakeEngine) -> None:
    workshop.publish("small", "aaaa", rank=2)
    workshop.publish("large", "12 34", rank=40)
    recorded = RecordedSteps()
    engine = make_engine(workshop, capture=recorded)
    crowd = [{"text": "abc", "max_tokens": 3}]
    for task, captures in (("small", 1), ("large", 2), ("small", 2), ("large", 2)):
        answer = ask_all(engine, [{**crowd[0], "task": task}])
        expected = workshop.reference("abc", task, 3)
        torch.testing.assert_close(told(workshop, answer)[0][1], expected, rtol=1e-4, atol=1e-4)
        assert len(recorded.recordings) == captures


def test_explained_answers_tell_the_weights_of_replayed_steps(kinds: Workshop, make_engine: MakeEngine) -> None:
    plain, replaying = make_engine(kinds), make_engine(kinds, capture=RecordedSteps())
    crowd = [{**wish, "explain": i % 2 == 0} for i, wish in enumerate(CROWD)]
    one, other = ([answer.wait().finished for answer in ask_all(engine, crowd)] for engine in (plain, replaying))
    assert [len(finished.explanation) for finished in one] == [2, 0, 2, 0, 2, 0, 2, 0]
    for expected, got in zip(one, other, strict=True):
        assert [each.layer for each in got.explanation] == [each.layer for each in expected.explanation]
        for layer, found in zip(expected.explanation, got.explanation, strict=True):
            assert found.experts == pytest.approx(layer.experts, abs=1e-5)
            assert found.groups == pytest.approx(layer.groups, abs=1e-5)
    assert replaying.statistics().graphs.fallbacks == 0


def test_what_is_explained_is_read_of_a_recording_of_its_own(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    recorded = RecordedSteps()
    engine = make_engine(three_tasks, capture=recorded)
    for explain, captures in ((False, 1), (True, 2), (False, 2), (True, 2)):
        answer = ask(engine, "abc", task="red", max_tokens=4, explain=explain).wait()
        assert bool(answer.finished.explanation) is explain
        assert len(recorded.recordings) == captures


def test_hyper_adapters_run_as_without_recording(workshop: Workshop, make_engine: MakeEngine) -> None:
    with_hyper(workshop, "table", top_k=1)
    plain, engine = make_engine(workshop), make_engine(workshop, capture=RecordedSteps())
    crowd = [{"text": "abc", "task": "green", "max_tokens": 4}]
    assert_alike(told(workshop, ask_all(plain, crowd)), told(workshop, ask_all(engine, crowd)))
    assert engine.statistics().graphs == GraphCounts(fallbacks=3)


def test_steps_with_drafts_run_as_without_recording(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    plain = make_engine(three_tasks)
    engine = make_engine(three_tasks, capture=RecordedSteps(), max_draft=4)
    crowd = [{"text": "la la la la la la", "base_only": True, "max_tokens": 24}]
    assert_alike(told(three_tasks, ask_all(plain, crowd)), told(three_tasks, ask_all(engine, crowd)))
    counts, statistics = engine.statistics().graphs, engine.statistics()
    assert statistics.drafted_tokens > 0
    assert counts.fallbacks > 0


def test_where_nothing_can_be_recorded_it_is_tried_once(three_tasks: Workshop, make_engine: MakeEngine) -> None:
    tried = []

    def refuse(run: Callable[[], None]) -> Captured:
        tried.append(run)
        raise UnsupportedDeviceError("no graphs here")

    plain, engine = make_engine(three_tasks), make_engine(three_tasks, capture=refuse)
    crowd = [{"text": "abc", "task": "red", "max_tokens": 5}, {"text": "ab", "task": "blue", "max_tokens": 3}]
    assert_alike(told(three_tasks, ask_all(plain, crowd)), told(three_tasks, ask_all(engine, crowd)))
    before = engine.statistics().graphs.fallbacks  # how many of the crowd's steps only decode is a matter of time
    ask(engine, "abc", task="red", max_tokens=5).wait()
    assert engine.statistics().graphs == GraphCounts(fallbacks=before + 4)
    assert len(tried) == 1


@dataclass
class Speaker:
    """As much of a sequence as a decode step reads."""

    held_slot: int
    position: int
    output: list[int]
    mixture: Mixture | None = None
    request: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(explain=False))


@pytest.fixture
def graphs_of(workshop: Workshop) -> Iterator[Callable[..., tuple[DecodeGraphs, KVCache]]]:
    def make(capture: RecordedSteps, **bounds: int) -> tuple[DecodeGraphs, KVCache]:
        model = LlamaModel(copy.deepcopy(workshop.base.model), max_context=256)
        cache = cache_of(model, num_slots=8)
        return DecodeGraphs(model, cache, LayerPacks(dtype=torch.float32, device=CPU), capture, **bounds), cache

    with torch.inference_mode():
        yield make


def run(graphs: DecodeGraphs, *speakers: Speaker) -> torch.Tensor | None:
    return graphs.run(speakers, [])  # type: ignore[arg-type]


def test_rows_that_fill_up_a_step_write_to_the_spare_slot_alone(
    graphs_of: Callable[..., tuple[DecodeGraphs, KVCache]],
) -> None:
    graphs, cache = graphs_of(RecordedSteps())
    torch.manual_seed(0)
    for held in (cache.keys, cache.values):
        held.copy_(torch.randn(held.shape))
    keys, values = cache.keys.clone(), cache.values.clone()
    run(graphs, Speaker(6, 40, [9]), Speaker(2, 130, [8]))  # rows for slots 1 to 8
    for before, after in ((keys, cache.keys), (values, cache.values)):
        changed = {tuple(place) for place in (before != after).any(4).any(2).any(0).nonzero().tolist()}
        assert changed == {(0, 0), (6, 40), (2, 130)}


def test_the_recording_that_was_replayed_longest_ago_goes_first(
    graphs_of: Callable[..., tuple[DecodeGraphs, KVCache]],
) -> None:
    graphs, _ = graphs_of(RecordedSteps(), max_recorded=2)
    for slot, captures in ((1, 1), (2, 2), (1, 2), (4, 3), (1, 3), (2, 4)):
        run(graphs, Speaker(slot, 3, [5]))
        assert graphs.counts.captures == captures


def test_beyond_the_bytes_no_more_is_recorded(graphs_of: Callable[..., tuple[DecodeGraphs, KVCache]]) -> None:
    graphs, _ = graphs_of(RecordedSteps(num_bytes=60), max_bytes=100)
    for slot in (1, 2):
        assert run(graphs, Speaker(slot, 3, [5])) is not None
    assert run(graphs, Speaker(4, 3, [5])) is None
    assert run(graphs, Speaker(2, 4, [5])) is not None
    assert graphs.counts == GraphCounts(replays=3, fallbacks=1, captures=2)


class NoHost(TorchDispatchMode):
    """Refuses every tensor that is not on the device `meta`, which has shapes and no values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            assert not isinstance(leaf, torch.Tensor) or leaf.is_meta, f"{func} has a tensor on {leaf.device}"
        return result


@pytest.mark.parametrize("num_speakers", [3, 17])
@pytest.mark.parametrize("launches", [False, True])
def test_a_recorded_step_needs_no_value_and_no_tensor_of_the_host(
    kinds: Workshop, num_speakers: int, *, launches: bool
) -> None:
    launched: list[Launch] = []

    def capture(step: Callable[[], None]) -> Captured:
        with NoHost():
            step()
        return Captured(lambda: None, 0)

    meta, launch = torch.device("meta"), launched.append if launches else None
    model = LlamaModel(copy.deepcopy(kinds.base.model).to(meta), max_context=256, launch=launch)
    cache = cache_of(model, num_slots=32)
    graphs = DecodeGraphs(model, cache, LayerPacks(dtype=torch.float32, device=meta), capture)
    generation, ref = open_generation(kinds.repertoire), base_ref(kinds.base.info)
    both = blended([(0.5, generation.mixture("red")), (0.5, generation.mixture("blue"))])
    mixtures = [*(generation.mixture(name) for name in ("red", "green", "blue")), both]

    def fetch(digest: str, layer: int) -> Expert:
        return fresh_expert(layer, rank=2, alpha=2.0, base=ref, generator=torch.Generator(), targets=TARGETS)

    speakers = [Speaker(1 + i, 20 + i, [5], mixtures[i % 4]) for i in range(num_speakers)]
    with torch.inference_mode():
        assert graphs.run(speakers, [(mixture, fetch) for mixture in mixtures]) is not None  # type: ignore[arg-type]
    assert graphs.counts == GraphCounts(replays=1, captures=1)
    kernels = {each.variant.kernel for each in launched}
    expected = {"grouped_shrink", "grouped_expand"} if num_speakers > 16 else {"decode_shrink", "decode_expand"}
    assert kernels == (expected if launches else set())


def test_nothing_is_recorded_on_a_cpu_and_no_slot_is_kept_for_it(workshop: Workshop, make_engine: MakeEngine) -> None:
    workshop.publish("red", "aaaa")
    assert step_capture(CPU, "auto") is None
    engine = make_engine(workshop, capture=step_capture(CPU, "off"))
    ask(engine, "abc", task="red", max_tokens=3).wait()
    assert engine.statistics().graphs == GraphCounts()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x[:, : int(x[0, 0])],
        lambda x: x + torch.tensor([1.0, 2.0]),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
    ],
)
def test_the_stand_in_refuses_what_no_recording_can_hold(wrong: Callable[[torch.Tensor], object]) -> None:
    x = torch.ones(2, 2)
    with pytest.raises(NotRecordableError), torch.inference_mode():
        RecordedSteps()(lambda: wrong(x))


def test_the_stand_in_sees_a_value_that_was_decided_once() -> None:
    x, y, added = torch.ones(2), torch.zeros(2), [1.0]
    captured = RecordedSteps()(lambda: y.copy_(x * 2 + added[0]))  # type: ignore[arg-type, return-value]
    x.fill_(4)
    captured.replay()
    assert y.tolist() == [9, 9]
    added[0] = 3.0
    with pytest.raises(WrongReplayError):
        captured.replay()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records on a CUDA device")
def test_a_cuda_device_replays_what_it_computes_step_by_step(kinds: Workshop, make_engine: MakeEngine) -> None:
    device = torch.device("cuda", torch.cuda.current_device())

    def model(source: Any, *, max_context: int) -> LlamaModel:
        return LlamaModel(source.to(device), max_context=max_context)

    plain = make_engine(kinds, model_class=model, max_running=4)
    replaying = make_engine(kinds, model_class=model, max_running=4, capture=CudaCapture(device))
    assert_alike(told(kinds, ask_all(plain, CROWD)), told(kinds, ask_all(replaying, CROWD)))
    counts = replaying.statistics().graphs
    assert counts.fallbacks == 0
    assert counts.replays > counts.captures > 0
