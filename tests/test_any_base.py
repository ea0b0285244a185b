"""Bases beside the Llama family: experts attached to GPT-2 and Gemma 3 and others, served through their own modules."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer
from engines import Answer, ask
from repertoires import PROTOTYPES, Workshop
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    MambaConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Starcoder2Config,
)

from exporters.constant_mixture import check_linears
from runtime.engine.attention import AttentionPlan, Segment
from runtime.engine.engine import Engine
from runtime.engine.kv import KVCache
from runtime.engine.module_model import ModuleModel
from runtime.engine.step_model import make_step_model
from runtime.errors import InvalidInputError, TensorMismatchError
from runtime.model.attach import attached, fresh_expert, load_mixture
from runtime.model.base import BaseModel, describe_base, load_base
from runtime.model.expert import linear_widths
from runtime.model.generation import base_ref, open_generation
from runtime.model.layer_names import layer_names
from runtime.model.manifest import TARGETS, Target
from runtime.model.repertoire import Repertoire
from training.config import TrainingConfig
from training.data import Example, TaskData
from training.grow import add_task

MakeEngine = Callable[..., Engine]
CPU = torch.device("cpu")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    **IDS,
}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 24}


def gpt2(vocabulary: int) -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=vocabulary, n_embd=64, n_layer=4, n_head=4, n_positions=512, initializer_range=0.15, **IDS
    )


def gemma3(vocabulary: int) -> PreTrainedConfig:
    return Gemma3TextConfig(vocab_size=vocabulary, query_pre_attn_scalar=24, **SIZES, **WINDOWS)


BASES = {"gpt2": gpt2, "gemma3": gemma3}
KINDS: dict[str, tuple[type[PreTrainedConfig], dict[str, object]]] = {
    "gemma2": (Gemma2Config, {**WINDOWS, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}),
    "gpt_neox": (GPTNeoXConfig, {}),
    "phi": (PhiConfig, {}),
    "phi3": (Phi3Config, {}),
    "starcoder2": (Starcoder2Config, {}),
}


def random_model(config: PreTrainedConfig) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(requires_grad=False)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases that do nothing would hide that they are left out
                torch.nn.init.normal_(parameter, float(parameter.mean()), 0.2)
    return model


def saved(config: PreTrainedConfig, folder: Path) -> BaseModel:
    random_model(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return load_base(folder, dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module", params=list(BASES))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp("bases") / request.param
    return saved(BASES[request.param](len(byte_tokenizer())), folder)


def targets_of(base: BaseModel) -> tuple[Target, ...]:
    return layer_names(base.info.architecture).targets


@pytest.fixture
def shop(base: BaseModel, tmp_path: Path) -> Workshop:
    """Three tasks on the base, with experts on all that it has."""
    shop = Workshop(base, Repertoire(tmp_path / "repertoire"))
    for rank, (name, prototype) in zip((4, 2, 8), PROTOTYPES.items(), strict=True):
        shop.publish(name, prototype, rank=rank, targets=targets_of(base))
    return shop


def logits(answer: Answer, shop: Workshop) -> torch.Tensor:
    return answer.wait().logits(shop.base.info.vocab_size)


@pytest.mark.parametrize("task", [None, "red", "blue"])
def test_an_answer_equals_the_attached_model_with_its_prompt_in_chunks(
    shop: Workshop, make_engine: MakeEngine, task: str | None
) -> None:
    prompt = "a prompt that is longer than the window and than a step"
    engine = make_engine(shop, model_class=ModuleModel, max_step_tokens=16)
    answer = ask(engine, prompt, task=task, base_only=task is None)
    expected = shop.reference(prompt, task, 8)
    torch.testing.assert_close(logits(answer, shop), expected, **TOLERANCE)
    assert answer.tokens == expected.argmax(1).tolist()
    if task is not None:
        assert (expected[0] - shop.reference(prompt, None, 1)[0]).norm() > 0.05 * expected[0].norm()


def test_located_prompts_of_several_tasks_answer_in_one_batch_as_alone(shop: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(shop, model_class=ModuleModel)
    together = {task: ask(engine, text) for task, text in PROTOTYPES.items()}
    plain = ask(engine, "plain", base_only=True)
    for task, answer in together.items():
        torch.testing.assert_close(logits(answer, shop), shop.reference(PROTOTYPES[task], task, 8), **TOLERANCE)
        assert (answer.located.task, answer.located.how) == (task, "located")
    torch.testing.assert_close(logits(plain, shop), shop.reference("plain", None, 8), **TOLERANCE)


def test_weights_are_told_and_drafts_hold_as_in_plain_decoding(shop: Workshop, make_engine: MakeEngine) -> None:
    plain = ask(make_engine(shop, model_class=ModuleModel), "abab abab", task="blue", explain=True, max_tokens=12)
    drafting = make_engine(shop, model_class=ModuleModel, max_draft=3)
    answer = ask(drafting, "abab abab", task="blue", max_tokens=12, keep_logits=False).wait()
    assert answer.tokens == plain.wait().tokens
    told = plain.finished.explanation
    assert [weights.layer for weights in told] == [2, 3]
    assert all(sum(weights.experts.values()) == pytest.approx(1.0, abs=1e-5) for weights in told)


def test_a_prefix_is_taken_from_an_earlier_prompt(shop: Workshop, make_engine: MakeEngine) -> None:
    engine = make_engine(shop, model_class=ModuleModel, prefix_budget_bytes=1 << 22)
    common = "the same beginning of several prompts, long enough for two blocks: "
    for end in ("one", "two"):
        answer = ask(engine, common + end, task="green", max_tokens=4)
        torch.testing.assert_close(logits(answer, shop), shop.reference(common + end, "green", 4), **TOLERANCE)
    assert engine.statistics().prefix_hits == 1


@pytest.mark.parametrize("kind", list(KINDS))
def test_experts_on_every_linear_of_other_architectures_give_what_the_attached_model_gives(
    tmp_path: Path, make_engine: MakeEngine, kind: str
) -> None:
    config_class, fields = KINDS[kind]
    config = config_class(**{"vocab_size": len(byte_tokenizer()), **SIZES, **fields})
    shop = Workshop(saved(config, tmp_path / kind), Repertoire(tmp_path / "repertoire"))
    shop.publish("red", PROTOTYPES["red"], targets=targets_of(shop.base))
    engine = make_engine(shop, model_class=ModuleModel, max_step_tokens=16)
    for task in ("red", None):
        answer = ask(engine, "hello there, " * 3, task=task, base_only=task is None, max_tokens=4)
        expected = shop.reference("hello there, " * 3, task, 4)
        torch.testing.assert_close(logits(answer, shop), expected, **TOLERANCE)


def test_every_target_of_an_architecture_changes_its_answer(base: BaseModel, tmp_path: Path) -> None:
    ids = torch.arange(3, 12).unsqueeze(0)
    plain = base.model(ids).logits
    for target in targets_of(base):
        shop = Workshop(base, Repertoire(tmp_path / target))
        shop.publish("red", "aaaa", targets=(target,))
        ffns = load_mixture(shop.repertoire, open_generation(shop.repertoire), "red", base.model)
        with attached(base.model, ffns), torch.no_grad():
            assert (base.model(ids).logits - plain).norm() > 1e-3 * plain.norm(), target
        assert torch.equal(base.model(ids).logits, plain)


def test_a_trained_task_is_served_as_it_was_trained(base: BaseModel, tmp_path: Path, make_engine: MakeEngine) -> None:
    repertoire = Repertoire(tmp_path / "repertoire")
    rows = tuple(Example(f"say {word}", word.upper()) for word in ("ab", "cd", "ef", "gh") * 4)
    config = TrainingConfig(rank=4, max_steps=6, batch_size=4, learning_rate=5e-3)
    for name in ("first", "second"):
        add_task(repertoire, base, TaskData(name, rows, rows[:4]), config)
    shop = Workshop(base, repertoire)
    (unit, *_) = repertoire.manifest().experts[0].units
    assert set(unit.ranks) == set(layer_names(base.info.architecture).ffn_targets)
    engine = make_engine(shop, model_class=ModuleModel)
    answer = ask(engine, "say ab", task="second")
    expected = reference(shop, "say ab", "second")
    torch.testing.assert_close(logits(answer, shop), expected, **TOLERANCE)
    assert not torch.allclose(expected, reference(shop, "say ab", None), atol=1e-3)


def reference(shop: Workshop, text: str, task: str | None) -> torch.Tensor:
    shop.first_layer = open_generation(shop.repertoire).manifest.first_layer
    return shop.reference(text, task, 8)


def test_a_target_that_an_architecture_lacks_is_named(tmp_path: Path) -> None:
    base = saved(gpt2(len(byte_tokenizer())), tmp_path / "gpt2")
    ref = base_ref(base.info)
    assert (base.info.width, base.info.ffn_width, base.info.kv_width, base.info.num_layers) == (64, 256, 64, 4)
    with pytest.raises(TensorMismatchError, match="target gate: GPT2LMHeadModel has q, k, v, o, up, down"):
        fresh_expert(0, rank=2, alpha=2.0, base=ref, generator=torch.Generator(), targets=TARGETS)
    assert linear_widths("down", ref) == (256, 64)
    with pytest.raises(InvalidInputError, match="architecture='GPT2LMHeadModel'"):
        check_linears(ref)
    assert describe_base(tmp_path / "gpt2") == base.info


def taken(model: torch.nn.Module, **changes: object) -> object:
    options = {"max_context": 64, "weights": "float32", "step": "auto", "folder": Path("unused"), "threads": 1}
    return make_step_model(model, **(options | changes))  # type: ignore[arg-type]


def test_a_base_that_our_own_steps_do_not_know_runs_through_its_modules(
    base: BaseModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        for step in ("auto", "torch"):
            assert isinstance(taken(copy.deepcopy(base.model), step=step), ModuleModel)
    assert "steps run through the base's own modules: base=" in caplog.text
    with pytest.raises(InvalidInputError, match=f"base='{base.model.config.model_type}'"):
        taken(copy.deepcopy(base.model), step="native")
    with pytest.raises(InvalidInputError, match=f"weights='int8': a {base.info.architecture} runs with float32, bfl"):
        taken(copy.deepcopy(base.model), weights="int8")
    with pytest.raises(InvalidInputError, match="max_context=513"):
        taken(copy.deepcopy(base.model), max_context=513)


def test_a_token_is_embedded_where_it_stands(base: BaseModel) -> None:
    model = ModuleModel(copy.deepcopy(base.model), max_context=32)
    ids = torch.tensor([5, 6, 5, 9])
    entering = base.model(ids.unsqueeze(0), output_hidden_states=True).hidden_states[0][0]
    torch.testing.assert_close(model.embed(ids), entering)
    order = torch.tensor([3, 0, 1, 2])
    torch.testing.assert_close(model.embed(ids[order], order), entering[order])
    assert torch.equal(entering[0], entering[2]) == (base.model.config.model_type != "gpt2")


def test_bfloat16_stays_near_float32(base: BaseModel) -> None:
    ids = torch.arange(3, 20)
    expected = base.model(ids.unsqueeze(0)).logits[0]
    model = ModuleModel(copy.deepcopy(base.model).to(torch.bfloat16), max_context=32)
    cache = KVCache(model.kv_shape(), num_slots=1, budget_bytes=1 << 30, dtype=model.kv_dtype, device=CPU)
    with torch.inference_mode():
        hidden = model.embed(ids)
        model.run_layers(hidden, range(4), AttentionPlan([], [Segment(0, 0, 17)], CPU), cache, None)
        got = model.logits(hidden)
    assert got.dtype == torch.float32
    assert 1e-4 < (got - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MixtralConfig(vocab_size=99, **SIZES, num_local_experts=2), "base='MixtralForCausalLM'.*gate_proj"),
        (MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2), "base='MambaForCausalLM'.*no model.layers"),
    ],
)
def test_an_architecture_that_cannot_take_experts_is_refused_by_name(config: PreTrainedConfig, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        taken(random_model(config))


class Crossing(torch.nn.Module):
    """A layer whose result depends on how much of the model has run."""

    def __init__(self, layer: torch.nn.Module, seen: list[int]) -> None:
        super().__init__()
        self.attn, self.mlp, self._layer, self._seen = layer.attn, layer.mlp, layer, seen

    def forward(self, hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        self._seen.append(1)
        return self._layer(hidden, *args, **kwargs) * len(self._seen)  # type: ignore[no-any-return]


def test_a_model_whose_layers_do_not_run_alone_as_together_is_refused() -> None:
    model = random_model(gpt2(99))
    seen: list[int] = []
    model.transformer.h = torch.nn.ModuleList(Crossing(layer, seen) for layer in model.transformer.h)
    with pytest.raises(InvalidInputError, match=r"base='GPT2LMHeadModel'.*so run they give other logits"):
        taken(model)
