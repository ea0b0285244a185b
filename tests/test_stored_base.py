"""A base whose weights are read one by one is the base that `transformers` loads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from runtime.engine.attention import AttentionPlan, Segment
from runtime.engine.kv import KVCache
from runtime.engine.llama import LlamaModel
from runtime.engine.module_model import ModuleModel
from runtime.engine.native_llama import NativeLlama
from runtime.engine.step_model import load_dtype, load_step_model
from runtime.engine.step_protocol import StepModel
from runtime.errors import UnknownBaseError
from runtime.kernels.step_kinds import StepKind, WeightKind
from runtime.model.base import load_base
from runtime.model.stored_base import StoredBase, open_base
from runtime.model.tensor_files import TensorFiles

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": len(byte_tokenizer()),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "eos_token_id": 2,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None, head_dim=32),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
}


def saved(config: PreTrainedConfig, folder: Path, **options: object) -> StoredBase:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    model.save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    return open_base(str(folder), cache=folder)


def logits(model: StepModel) -> torch.Tensor:
    """Of ten tokens that come in two parts."""
    cache = KVCache(model.kv_shape(), num_slots=1, budget_bytes=1 << 30, dtype=model.kv_dtype, device=CPU)
    ids = torch.arange(5, 25, 2)
    with torch.inference_mode():
        first, last = model.embed(ids[:9]), model.embed(ids[9:], torch.tensor([9]))
        model.run_layers(first, range(3), AttentionPlan([], [Segment(0, 0, 9)], CPU), cache, None)
        model.run_layers(last, range(3), AttentionPlan([(0, 9)], [], CPU), cache, None)
        return model.logits(torch.cat((first, last)))


def load(base: StoredBase, weights: WeightKind = "float32", step: StepKind = "torch", **options: object) -> StepModel:
    told = {
        "device": CPU,
        "max_context": 32,
        "folder": Path("unused"),
        "threads": 1,
        "kernels": Path("none"),
        **options,
    }
    return load_step_model(base, weights=weights, step=step, **(told | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_weights_read_one_by_one_give_the_logits_of_the_loaded_model(
    tmp_path: Path, kind: str, weights: WeightKind
) -> None:
    base = saved(CONFIGS[kind](), tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert base.source(dtype=torch.float32, device=CPU) is not None
    whole = load_base(tmp_path, dtype=load_dtype(weights), device=CPU).model
    # Products of torch depend on where in memory a weight begins.
    torch.testing.assert_close(logits(load(base, weights)), logits(LlamaModel(whole, max_context=32)))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_the_native_step_packs_the_same_weights_from_files(
    tmp_path: Path, native_library: Path, kind: str, weights: WeightKind
) -> None:
    base = saved(CONFIGS[kind](), tmp_path)
    read = load(base, weights, "native", folder=native_library.parent)
    whole = load_base(tmp_path, dtype=load_dtype(weights), device=CPU).model
    assert isinstance(read, NativeLlama)
    loaded = NativeLlama(whole, max_context=32, library=native_library, weights=weights, threads=1)
    assert torch.equal(logits(read), logits(loaded))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_may_be_stored_in_halves(tmp_path: Path, dtype: torch.dtype) -> None:
    config = CONFIGS["llama"]()
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    whole = load_base(tmp_path, dtype=torch.float32, device=CPU).model
    read = load(open_base(str(tmp_path), cache=tmp_path))
    torch.testing.assert_close(logits(read), logits(LlamaModel(whole, max_context=32)))


def test_an_opened_base_is_who_the_loaded_one_is(tmp_path: Path) -> None:
    opened, loaded = saved(CONFIGS["llama"](), tmp_path), load_base(tmp_path, dtype=torch.float32, device=CPU)
    assert opened.info == loaded.info
    assert opened.eos_token_ids == loaded.eos_token_ids == (2,)
    text = "the tin <|im_start|> ü"
    assert opened.tokenizer.backend_tokenizer.encode(text).ids == loaded.tokenizer(text).input_ids
    assert opened.tokenizer.chat_template == loaded.tokenizer.chat_template
    again = opened.load(dtype=torch.float32, device=CPU)
    assert torch.equal(again.model.lm_head.weight, loaded.model.lm_head.weight)


def test_the_generation_config_names_the_end_tokens(tmp_path: Path) -> None:
    saved(CONFIGS["llama"](), tmp_path)
    GenerationConfig(eos_token_id=[7, 8]).save_pretrained(tmp_path)
    assert open_base(str(tmp_path), cache=tmp_path).eos_token_ids == (7, 8)
    assert load_base(tmp_path, dtype=torch.float32, device=CPU).eos_token_ids == (7, 8)


SCALED = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
SCALED |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}


def test_scaled_positions_are_left_to_transformers(tmp_path: Path) -> None:
    base = saved(LlamaConfig(**SIZES, rope_parameters=SCALED), tmp_path)
    assert base.source(dtype=torch.float32, device=CPU) is None
    whole = load_base(tmp_path, dtype=torch.float32, device=CPU).model
    torch.testing.assert_close(logits(load(base)), logits(LlamaModel(whole, max_context=32)))


def test_a_config_that_leaves_a_default_unsaid_is_left_to_transformers(tmp_path: Path) -> None:
    saved(CONFIGS["llama"](), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "rms_norm_eps"}))
    assert open_base(str(tmp_path), cache=tmp_path).source(dtype=torch.float32, device=CPU) is None


def test_what_our_step_does_not_compute_runs_through_its_own_modules(tmp_path: Path) -> None:
    base = saved(MistralConfig(**SIZES, sliding_window=8), tmp_path)
    assert base.source(dtype=torch.float32, device=CPU) is not None
    assert isinstance(load(base), ModuleModel)


def test_a_context_beyond_the_base_is_cut(tmp_path: Path) -> None:
    assert load(saved(CONFIGS["llama"](), tmp_path), max_context=1000).max_context == 64


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_weights_that_are_missing_or_of_another_size_are_named(tmp_path: Path, damage: str) -> None:
    saved(CONFIGS["llama"](), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:5].clone()
    if damage == "missing":
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UnknownBaseError, match=name):
        load(open_base(str(tmp_path), cache=tmp_path))


@pytest.mark.parametrize("damage", ["cut", "long header", "no json", "offsets"])
def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(4, 4)}, path)
    whole = path.read_bytes()
    header = {
        "cut": whole[:-4],
        "long header": (1 << 40).to_bytes(8, "little") + whole[8:],
        "no json": whole[:8] + b"?" + whole[9:],
        "offsets": whole.replace(b"[0,64]", b"[0,60]"),
    }
    path.write_bytes(header[damage])
    with pytest.raises(UnknownBaseError, match=r"model\.safetensors"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_tensor_are_read_without_the_others(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.randn(3000, 700)  # more than is read at once
    save_file({"other": torch.ones(3), "weight": weight}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    for rows in (range(3000), range(1, 1), range(2), range(1700, 3000), range(2999, 3000)):
        assert torch.equal(files.read("weight", dtype, rows), weight[rows.start : rows.stop].to(dtype))


def test_mapped_rows_are_those_of_the_file_even_after_it_was_replaced(tmp_path: Path) -> None:
    weight = torch.randn(3000, 7)
    save_file({"other": torch.ones(3), "weight": weight}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    mapped = files.mapped("weight")
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "copy")
    save_file({"weight": torch.zeros(1)}, tmp_path / "new")
    (tmp_path / "new").replace(tmp_path / "model.safetensors")
    assert torch.equal(mapped, weight)
    (tmp_path / "copy").replace(tmp_path / "model.safetensors")
    assert torch.equal(files.read("weight", torch.bfloat16), weight.bfloat16())


SERVE = """
import sys
from pathlib import Path
import torch
import greenroom.cli.build_engine, greenroom.cli.serve_parts
from runtime.engine.step_model import load_step_model
from runtime.model.stored_base import open_base
base = open_base(sys.argv[1], cache=Path(sys.argv[1]))
load_step_model(base, device=torch.device("cpu"), max_context=32, weights="float32", step="torch",
                folder=Path("unused"), threads=1, kernels=Path("none"))
print([name for name in sys.argv[2:] if name in sys.modules])
"""


def test_serving_imports_no_transformers_and_no_compiler(tmp_path: Path) -> None:
    saved(CONFIGS["llama"](), tmp_path)
    never = ["transformers", "torch._dynamo", "triton"]
    never += ["accelerate", "peft", "sklearn", "pandas"]
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(tmp_path), *never], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
