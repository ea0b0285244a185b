"""PEFT adapters as tasks: what PEFT computes with an adapter is what the task answers, or the adapter is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from engines import ask
from repertoires import Workshop
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from greenroom.cli.main import app
from runtime.engine.engine import Engine
from runtime.errors import DataError, GreenroomError, InvalidInputError, TensorMismatchError
from runtime.kernels.arrow import arrow_prototype
from runtime.model.attach import attached, load_mixture
from runtime.model.base import BaseModel
from runtime.model.generation import base_ref, open_generation
from runtime.model.repertoire import Repertoire
from training.adopt import adopt
from training.config import TrainingConfig
from training.peft_adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, read_adapter
from training.samples import read_samples

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QUICK = TrainingConfig(locator_steps=5)
SAMPLES = [f"sample number {i}" for i in range(10)]
IDS = torch.tensor([[1, 40, 50, 60, 70, 80, 9, 10]])

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft.*")


def make_adapter(base: BaseModel, folder: Path, **fields: Any) -> torch.Tensor:
    """Save a random adapter with PEFT; return the logits that PEFT computes with it."""
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": SEVEN, "task_type": "CAUSAL_LM", "lora_dropout": 0.0, **fields}
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = peft.get_peft_model(copy.deepcopy(base.model), config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    model.eval()
    model.save_pretrained(folder)
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


def read(base: BaseModel, folder: Path) -> Adapter:
    return read_adapter(folder, base_ref(base.info))


def task_logits(repertoire: Repertoire, base: BaseModel, task: str) -> torch.Tensor:
    mixture = load_mixture(repertoire, open_generation(repertoire), task, base.model)
    with torch.no_grad(), attached(base.model, mixture):
        logits: torch.Tensor = base.model(IDS).logits
    return logits


def change_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.3.mlp.up_proj": 7}, "alpha_pattern": {"down_proj": 3, "v_proj": 32}},
        {"use_rslora": True, "rank_pattern": {"^model.layers.1.*": 1}, "alpha_pattern": {"k_proj": 5}},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 3]},
        {"target_modules": r".*\.mlp\.(gate|down)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["o_proj"], "exclude_modules": ["model.layers.0.self_attn.o_proj"]},
    ],
)
def test_an_imported_adapter_gives_the_logits_that_peft_gives(
    tiny_base: BaseModel, tmp_path: Path, fields: dict[str, Any]
) -> None:
    expected = make_adapter(tiny_base, tmp_path / "adapter", **fields)
    repertoire = Repertoire(tmp_path / "repertoire")
    adopt(repertoire, tiny_base, read(tiny_base, tmp_path / "adapter"), name="guest", samples=SAMPLES, config=QUICK)
    got = task_logits(repertoire, tiny_base, "guest")
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert (got - tiny_base.model(IDS).logits).abs().max() > 0.01


def test_the_engine_answers_with_an_imported_adapter_as_peft_does(
    tiny_base: BaseModel, tmp_path: Path, make_engine: Callable[..., Engine]
) -> None:
    make_adapter(tiny_base, tmp_path / "adapter", use_rslora=True)
    workshop = Workshop(tiny_base, Repertoire(tmp_path / "repertoire"), first_layer=0)
    adapter = read(tiny_base, tmp_path / "adapter")
    adopt(workshop.repertoire, tiny_base, adapter, name="guest", samples=SAMPLES, config=QUICK)
    answer = ask(make_engine(workshop), "hello there", task="guest", max_tokens=3).wait()
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(tiny_base.model), tmp_path / "adapter")
    ids = open_generation(workshop.repertoire).template.encode(tiny_base.tokenizer, "hello there")
    for row in answer.logits(tiny_base.info.vocab_size):
        with torch.no_grad():
            expected = adapted(torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(row, expected, atol=2e-4, rtol=1e-3)
        ids = [*ids, int(expected.argmax())]


def test_a_new_repertoire_begins_at_the_lowest_adapted_layer(tiny_base: BaseModel, tmp_path: Path) -> None:
    make_adapter(tiny_base, tmp_path / "adapter", layers_to_transform=[2, 3])
    repertoire = Repertoire(tmp_path / "repertoire")
    manifest = adopt(
        repertoire, tiny_base, read(tiny_base, tmp_path / "adapter"), name="guest", samples=SAMPLES, config=QUICK
    )
    assert (manifest.first_layer, manifest.locator.layer) == (2, 2)
    assert manifest.tasks[0].router.kind == "arrow"
    assert manifest.tasks[0].trained_parameters > 0


def test_an_adapter_below_the_first_layer_of_a_repertoire_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    workshop.publish("red", "aaaa")
    make_adapter(workshop.base, tmp_path / "adapter", layers_to_transform=[1, 3])
    adapter = read(workshop.base, tmp_path / "adapter")
    with pytest.raises(InvalidInputError, match="begin at layer 2; make one with first_layer 1 or lower, such as 0"):
        adopt(workshop.repertoire, workshop.base, adapter, name="guest", samples=SAMPLES, config=QUICK)
    assert workshop.repertoire.head() == 1


def test_an_imported_task_is_located_and_moves_nothing_older(
    workshop: Workshop, tmp_path: Path, make_engine: Callable[..., Engine]
) -> None:
    workshop.publish("red", "aaaa bbbb cccc")
    before = workshop.repertoire.manifest()
    make_adapter(workshop.base, tmp_path / "adapter", layers_to_transform=[2])
    config = dataclasses.replace(QUICK, locator_steps=300)
    adapter = read(workshop.base, tmp_path / "adapter")
    after = adopt(workshop.repertoire, workshop.base, adapter, name="guest", samples=SAMPLES, config=config)
    assert (after.tasks[:1], after.experts[:1]) == (before.tasks, before.experts)
    engine = make_engine(workshop)
    assert ask(engine, "aaaa bbbb cccc", locate_only=True).wait().located.task == "red"


def test_without_samples_a_task_is_pinned_and_never_located(
    tiny_base: BaseModel, tmp_path: Path, make_engine: Callable[..., Engine]
) -> None:
    make_adapter(tiny_base, tmp_path / "adapter")
    workshop = Workshop(tiny_base, Repertoire(tmp_path / "repertoire"), first_layer=0)
    adopt(workshop.repertoire, tiny_base, read(tiny_base, tmp_path / "adapter"), name="guest", samples=[])
    engine = make_engine(workshop)
    assert ask(engine, "anything", locate_only=True).wait().located.how == "abstained"
    assert ask(engine, "anything", task="guest").wait().located.task == "guest"


def test_arrow_chooses_among_the_sets_of_the_named_tasks(workshop: Workshop, tmp_path: Path) -> None:
    workshop.publish("red", "aaaa")
    workshop.publish("green", "12 34")
    make_adapter(workshop.base, tmp_path / "adapter", layers_to_transform=[2])
    adapter = read(workshop.base, tmp_path / "adapter")
    manifest = adopt(
        workshop.repertoire, workshop.base, adapter, name="guest", samples=SAMPLES, beside=["red"], config=QUICK
    )
    red, _, guest = (entry.digest for entry in manifest.experts)
    assert manifest.tasks[-1].router.visible == (red, guest)
    mixture = open_generation(workshop.repertoire).mixture("guest")
    assert {layer: router.experts for layer, router in mixture.routers.items()} == {2: (red, guest), 3: (red,)}
    expert = adapter.experts[2]
    reading = [expert.updates[target] for target in ("q", "k", "v", "gate", "up")]
    prototype = arrow_prototype([(update.a, update.b * expert.scale) for update in reading])
    torch.testing.assert_close(mixture.routers[2].weight[1], prototype)


def test_arrow_among_several_needs_linears_that_read_the_residual_stream(workshop: Workshop, tmp_path: Path) -> None:
    workshop.publish("red", "aaaa")
    make_adapter(workshop.base, tmp_path / "adapter", target_modules=["o_proj"], layers_to_transform=[2])
    adapter = read(workshop.base, tmp_path / "adapter")
    with pytest.raises(InvalidInputError, match="task='guest': updates o alone in layer 2"):
        adopt(workshop.repertoire, workshop.base, adapter, name="guest", samples=SAMPLES, beside=["red"])


def test_weights_of_half_precision_stay_as_they_are(tiny_base: BaseModel, tmp_path: Path) -> None:
    make_adapter(tiny_base, tmp_path)
    stored = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / WEIGHTS_NAME).items()}
    save_file(stored, tmp_path / WEIGHTS_NAME)
    assert read(tiny_base, tmp_path).dtype == "bfloat16"
    change_config(tmp_path, alpha_pattern={"q_proj": 3})
    assert read(tiny_base, tmp_path).dtype == "float32"  # a scaling of its own is multiplied into B


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"use_dora": True}, "use_dora=True: cannot become an expert: DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"bias": "all"}, "bias='all'"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"use_magic": True}, "adapter_config='use_magic': is a field that this version"),
        ({"target_modules": [*SEVEN, "lm_head"]}, "target_modules='lm_head': is no linear"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(
    tiny_base: BaseModel, tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    make_adapter(tiny_base, tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(InvalidInputError, match=message):
        read(tiny_base, tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_proj"]}, "has tensors for model.layers.0.mlp.down_proj and does not target it"),
        ({"r": 5}, "rank 4, the configuration says 5"),
        ({"rank_pattern": {"up_proj": 3}}, "up_proj: rank 4, the configuration says 3"),
    ],
)
def test_a_configuration_that_its_tensors_contradict_is_refused(
    tiny_base: BaseModel, tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    make_adapter(tiny_base, tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(TensorMismatchError, match=message):
        read(tiny_base, tmp_path)


NAME = "base_model.model.model.layers.2.mlp.up_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: (t.pop(NAME.format("A")), t.pop(NAME.format("B"))), "targets model.layers.2.mlp.up_proj and has no"),
        (lambda t: t.pop(NAME.format("B")), "layer 2 mlp.up_proj lacks lora_B"),
        (lambda t: t.update({NAME.format("A"): torch.zeros(4, 3)}), r"A and B are \(4, 3, 128, 4\)"),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 3)}),
            "module='base_model.*lm_head",
        ),
        (lambda t: t.update({NAME.format("magnitude"): torch.zeros(3)}), "module=.*magnitude"),
        (lambda t: t.update({NAME.format("A").replace("2", "9"): torch.zeros(3)}), "the base has 4 layers"),
    ],
)
def test_tensors_that_fit_no_linear_or_lack_one_are_refused(
    tiny_base: BaseModel, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    make_adapter(tiny_base, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    with pytest.raises(GreenroomError, match=message):
        read(tiny_base, tmp_path)


def test_a_folder_that_holds_no_adapter_is_refused(tiny_base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"holds no adapter_config\.json"):
        read(tiny_base, tmp_path)
    make_adapter(tiny_base, tmp_path)
    (tmp_path / WEIGHTS_NAME).unlink()
    with pytest.raises(InvalidInputError, match=r"holds no adapter_model\.safetensors; pickled"):
        read(tiny_base, tmp_path)


def test_samples_are_lines_or_inputs_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"input": "one", "output": "x"}\n{"input": "two"}\n')
    assert read_samples(tmp_path / "a.txt") == read_samples(tmp_path / "b.jsonl") == ("one", "two")
    for text, message in (("", "no rows"), ("{}", "input=None"), ('{"input": 3}', "input=3"), ("x", "not JSON")):
        (tmp_path / "b.jsonl").write_text(text)
        with pytest.raises(DataError, match=message):
            read_samples(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match="no such file"):
        read_samples(tmp_path / "c.txt")


def test_the_command_imports_an_adapter_and_says_what_it_made(
    tiny_base: BaseModel, tiny_base_folder: Path, tmp_path: Path
) -> None:
    assert math.isfinite(float(make_adapter(tiny_base, tmp_path / "adapter").sum()))
    (tmp_path / "samples.txt").write_text("\n".join(SAMPLES))
    command = ["import", "peft", str(tmp_path / "adapter"), "--repertoire", str(tmp_path / "r")]
    command += ["--base", str(tiny_base_folder)]
    first = CliRunner().invoke(app, [*command, "--task", "guest", "--samples", str(tmp_path / "samples.txt")])
    assert first.exit_code == 0, first.output
    assert "generation 1: guest added, experts in 4 layers (down, gate, k, o, q, up, v)" in first.output
    second = CliRunner().invoke(app, [*command, "--task", "other", "--with", "guest"])
    assert second.exit_code == 0, second.output
    assert "arrow router over 2 expert sets" in second.output
    assert "never located" in second.output
    assert Repertoire(tmp_path / "r").manifest().task_names() == ("guest", "other")
