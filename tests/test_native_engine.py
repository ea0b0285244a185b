"""The engine on the native step: equal to the mixture attached to the Hugging Face model, whatever else runs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engines import Answer, ask
from native import NativeClass
from repertoires import Workshop
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from runtime.engine.attention import AttentionPlan, Segment
from runtime.engine.engine import Engine
from runtime.engine.kv import KVCache
from runtime.engine.llama import LlamaModel, MixtureRows
from runtime.engine.native_llama import NativeLlama
from runtime.engine.stage import LayerPacks, Stage
from runtime.engine.step_model import load_dtype, make_step_model
from runtime.errors import InvalidInputError, UnsupportedDeviceError
from runtime.kernels.native_step import NativeStep, StepShape
from runtime.kernels.step_kinds import WeightKind
from runtime.model.expert import Expert
from runtime.model.generation import open_generation
from runtime.model.manifest import TARGETS
from runtime.model.mixture import Mixture

MakeEngine = Callable[..., Engine]
TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}
PROMPTS = ("aaaa bbbb", "12 34", "? ! ?", "a much longer prompt that spans more than one tile of eight tokens")


def publish(workshop: Workshop) -> None:
    """Tasks of different targets, ranks and kinds; every later one sees all before it."""
    workshop.publish("red", "aaaa bbbb cccc", targets=TARGETS)
    workshop.publish("green", "12 34 56 78 90", rank=2)
    workshop.publish("blue", "? ! ? ! ? ! ? !", rank=7, targets=("q", "v", "down"))
    workshop.publish("grey", "! ! ! !", kind="arrow")


def logits(workshop: Workshop, answer: Answer) -> torch.Tensor:
    return answer.wait().logits(workshop.base.info.vocab_size)


@pytest.mark.parametrize("task", [None, "red", "green", "blue", "grey"])
def test_float32_answers_as_the_attached_model(
    workshop: Workshop, make_engine: MakeEngine, native_class: NativeClass, task: str | None
) -> None:
    publish(workshop)
    engine = make_engine(workshop, model_class=native_class("float32"))
    for prompt in PROMPTS:
        got = logits(workshop, ask(engine, prompt, task=task, base_only=task is None, max_tokens=5))
        torch.testing.assert_close(got, workshop.reference(prompt, task, 5), **TOLERANCE)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_an_answer_is_the_same_bit_for_bit_alone_and_in_a_batch(
    workshop: Workshop, make_engine: MakeEngine, native_class: NativeClass, weights: WeightKind
) -> None:
    publish(workshop)
    engine = make_engine(workshop, model_class=native_class(weights))
    wishes = [(prompt, task) for prompt in PROMPTS for task in ("red", "green", "blue", "grey", None)]

    def begin(prompt: str, task: str | None) -> Answer:
        return ask(engine, prompt, task=task, base_only=task is None, max_tokens=6)

    alone = [logits(workshop, begin(*wish)) for wish in wishes]
    together = [begin(*wish) for wish in wishes]
    for expected, answer in zip(alone, together, strict=True):
        assert torch.equal(logits(workshop, answer), expected)


def test_threads_do_not_change_an_answer(
    workshop: Workshop, make_engine: MakeEngine, native_class: NativeClass
) -> None:
    publish(workshop)
    engines = [make_engine(workshop, model_class=native_class("int8", threads)) for threads in (1, 2, 3)]  # type: ignore[call-arg]
    one, *others = (logits(workshop, ask(engine, PROMPTS[3], task="blue", max_tokens=6)) for engine in engines)
    assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize(("weights", "tolerance"), [("bfloat16", 0.02), ("int8", 0.03), ("int4", 0.25)])
def test_rounded_weights_stay_near(
    workshop: Workshop, make_engine: MakeEngine, native_class: NativeClass, weights: WeightKind, tolerance: float
) -> None:
    publish(workshop)
    for model_class in (native_class(weights), stepping(workshop, weights)):
        engine = make_engine(workshop, model_class=model_class)
        answer = ask(engine, PROMPTS[0], task="red", max_tokens=1)
        got, expected = logits(workshop, answer), workshop.reference(PROMPTS[0], "red", 1)
        error = ((got - expected).norm() / expected.norm()).item()
        assert 1e-5 < error < tolerance


@pytest.mark.parametrize("sign", [1, -1])
def test_four_bits_keep_sixteen_levels_on_whichever_side_the_largest_weight_is(native_library: Path, sign: int) -> None:
    sizes = StepShape(
        layers=1, width=64, ffn=32, heads=4, kv_heads=2, head_width=16, vocabulary=64, context=8, epsilon=1e-5
    )
    step = NativeStep(native_library, sizes, weights="int4", threads=1)
    levels = sign * torch.arange(-8, 8).repeat(64, 4) / 32  # [2 F, D]
    step.set("gate_up", 0, levels)
    x = torch.randint(-127, 128, (3, 64)).float()
    x[:, 0] = 127  # so that inputs of 8 bits hold x as it is
    torch.testing.assert_close(step.linear("gate_up", 0, x), x @ levels.t(), atol=1e-3, rtol=0)
    step.close()


def stepping(workshop: Workshop, weights: WeightKind) -> Callable[..., LlamaModel]:
    """What makes models that run on torch's operations with these weights."""

    def make(model: PreTrainedModel, *, max_context: int) -> LlamaModel:
        cast = model.to(load_dtype(weights))
        return make_step_model(
            cast, max_context=max_context, weights=weights, step="torch", folder=Path("unused"), threads=1
        )

    return make


def test_a_grouped_mixture_in_the_batch_runs_on_the_same_weights(
    workshop: Workshop, make_engine: MakeEngine, native_class: NativeClass
) -> None:
    workshop.publish("red", "aaaa", targets=TARGETS)
    workshop.publish("green", "12 34")
    workshop.publish("blue", "? !", grouping={"groups": ("one", "one", "two"), "scope": "token", "within": "input"})
    engine = make_engine(workshop, model_class=native_class("float32"))
    answers = [(task, ask(engine, PROMPTS[0], task=task, max_tokens=4)) for task in ("red", "blue")]
    for task, answer in answers:
        torch.testing.assert_close(logits(workshop, answer), workshop.reference(PROMPTS[0], task, 4), **TOLERANCE)


def test_the_weights_of_an_answer_are_told_as_by_torch(
    workshop: Workshop, make_engine: MakeEngine, native_class: NativeClass
) -> None:
    publish(workshop)
    told = []
    for model_class in (native_class("float32"), LlamaModel):
        engine = make_engine(workshop, model_class=model_class)
        answer = ask(engine, PROMPTS[3], task="blue", explain=True, max_tokens=4).wait()
        told.append(answer.finished.explanation)
    native, torchs = told
    assert len(native) == len(torchs) > 0
    for one, other in zip(native, torchs, strict=True):
        assert one.layer == other.layer
        assert one.experts == pytest.approx(other.experts, abs=1e-4)


def test_the_native_step_tells_where_its_time_went(
    workshop: Workshop, make_engine: MakeEngine, native_class: NativeClass
) -> None:
    publish(workshop)
    models: list[NativeLlama] = []

    def make_kept(model: PreTrainedModel, *, max_context: int) -> LlamaModel:
        models.append(native_class("int8")(model, max_context=max_context))  # type: ignore[arg-type]
        return models[-1]

    ask(make_engine(workshop, model_class=make_kept), PROMPTS[0], task="red", max_tokens=4).wait()
    first, again = models[0].step.phases(), models[0].step.phases()
    assert len(first) == 9
    assert all(seconds > 0 for seconds in first.values())
    assert set(again.values()) == {0.0}


def test_tasks_that_share_experts_ask_for_each_once_until_both_are_forgotten(
    three_tasks: Workshop, native_class: NativeClass
) -> None:
    generation = open_generation(three_tasks.repertoire)
    blue, green = (generation.mixture(task) for task in ("blue", "green"))  # blue sees all that green sees
    units = {(entry.digest, unit.layer): (entry, unit) for entry, unit in generation.task_units("blue")}
    asked: list[tuple[str, int]] = []

    def fetch(digest: str, layer: int) -> Expert:
        asked.append((digest, layer))
        return three_tasks.repertoire.read_unit(*units[digest, layer], generation.manifest.base)

    cpu = torch.device("cpu")
    model = native_class("float32")(copy.deepcopy(three_tasks.base.model), max_context=32)
    cache = KVCache(model.kv_shape(), num_slots=2, budget_bytes=1 << 30, dtype=model.kv_dtype, device=cpu)

    def step(*mixtures: Mixture) -> list[tuple[str, int]]:
        """Run a token of each; what was asked for."""
        asked.clear()
        stage = Stage([(mixture, fetch) for mixture in mixtures], LayerPacks(dtype=torch.float32, device=cpu))
        rows = MixtureRows(stage, torch.tensor([stage.row(mixture) for mixture in mixtures]))
        with torch.inference_mode():
            hidden = model.embed(torch.arange(len(mixtures)))
            plan = AttentionPlan([(slot, 0) for slot in range(len(mixtures))], [], cpu)
            model.run_layers(hidden, range(len(model.layers)), plan, cache, rows)
        return sorted(asked)

    assert step(green, blue) == sorted(units)
    assert step(green, blue) == []
    model.forget(frozenset({blue.digest}))
    assert step(green) == []
    model.forget(frozenset({green.digest}))
    kept = {(digest, layer) for layer, router in green.routers.items() for digest in router.experts}
    assert step(blue) == sorted(units.keys() - kept)
    model.forget(frozenset())
    assert step(green, blue) == sorted(units)


CONFIG = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "sliding_window": None,
}


@pytest.mark.parametrize("config", [MistralConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("native", [True, False])
def test_bases_of_the_llama_family_compute_what_transformers_computes(
    native_class: NativeClass, config: type, *, native: bool
) -> None:
    fields = {key: value for key, value in CONFIG.items() if key != "head_dim" or config is not Qwen2Config}
    fields |= {"num_attention_heads": 2, "num_key_value_heads": 1} if config is Qwen2Config else {}
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config(**fields)).eval()
    for parameter in reference.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    model = (native_class("float32") if native else LlamaModel)(copy.deepcopy(reference), max_context=32)
    ids = torch.randint(0, 99, (12,))
    shape = model.kv_shape()
    cache = KVCache(shape, num_slots=2, budget_bytes=1 << 30, dtype=model.kv_dtype, device=torch.device("cpu"))
    with torch.inference_mode():
        hidden = model.embed(ids[:11])
        plan = AttentionPlan([], [Segment(1, 0, 11)], torch.device("cpu"))
        model.run_layers(hidden, range(2), plan, cache, None)
        last = model.embed(ids[11:])
        model.run_layers(last, range(2), AttentionPlan([(1, 11)], [], torch.device("cpu")), cache, None)
        got = model.logits(torch.cat((hidden, last)))
        torch.testing.assert_close(got, reference(ids[None]).logits[0], atol=1e-4, rtol=1e-4)


def test_a_sliding_window_shorter_than_the_context_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(MistralConfig(**{**CONFIG, "sliding_window": 16}))
    with pytest.raises(InvalidInputError, match="slides over 16"):
        LlamaModel(model, max_context=32)


def tiny(base: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(base)


def make(model: PreTrainedModel, **changes: object) -> LlamaModel:
    options = {"max_context": 64, "weights": "float32", "step": "auto", "folder": Path("unused"), "threads": 1}
    return make_step_model(model, **(options | changes))  # type: ignore[arg-type]


def test_auto_takes_the_native_step_where_it_builds(workshop: Workshop, native_library: Path) -> None:
    made = make(tiny(workshop.base.model), folder=native_library.parent)
    assert isinstance(made, NativeLlama)


def test_auto_takes_torch_where_nothing_can_be_built_and_says_why(
    workshop: Workshop, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.INFO):
        made = make(tiny(workshop.base.model), folder=tmp_path / "native")
    assert type(made) is LlamaModel
    assert "steps run on torch's operations: " in caplog.text


def test_native_where_nothing_can_be_built_is_an_error(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedDeviceError):
        make(tiny(workshop.base.model), step="native", folder=tmp_path / "native")


@pytest.mark.parametrize(("field", "value"), [("weights", "int2"), ("step", "fast")])
def test_unknown_choices_are_named(workshop: Workshop, field: str, value: str) -> None:
    with pytest.raises(InvalidInputError, match=value):
        make(tiny(workshop.base.model), **{field: value})
