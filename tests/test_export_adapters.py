"""Constant mixtures as PEFT adapter, merged folder and GGUF adapter: equal to the mixture, or not written at all.

Read first: what is wanted is the base with the experts added to its weights by hand, or a routed mixture that is
constant.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from exports import files_below
from repertoires import Workshop
from safetensors.torch import load_file, save_file

from exporters.constant_mixture import constant_weights
from exporters.options import Options
from exporters.peft_adapter import _config
from exporters.targets import Exported, export
from runtime.errors import BaseMismatchError, ExportMismatchError, InvalidInputError, UnknownTaskError
from runtime.model.attach import attached, load_mixture
from runtime.model.base import BaseModel, load_base
from runtime.model.expert import LowRank
from runtime.model.generation import open_generation
from runtime.model.manifest import FFN_TARGETS
from runtime.model.repertoire import Repertoire

IDS = torch.tensor([[1, 30, 41, 52, 63, 74, 5, 96, 107, 2]])
CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def tasks(workshop: Workshop) -> Workshop:
    """red (rank 4) and blue (rank 8) in layers 2 and 3, green (rank 2) in layer 3 alone."""
    workshop.publish("red", "aaaa bbbb cccc", rank=4)
    workshop.publish("green", "12 34 56 78 90", rank=2, layers=[3])
    workshop.publish("blue", "? ! ? ! ? ! ? !", rank=8)
    return workshop


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


def merged_by_hand(workshop: Workshop, folder: Path, weights: dict[int, dict[str, float]]) -> torch.nn.Module:
    """The base with `sum_e w_e scale_e B_e A_e` added to its weights; `weights`: layer -> task -> w."""
    model = load_base(folder, dtype=torch.float32, device=CPU).model
    manifest = workshop.repertoire.manifest()
    for layer, experts in weights.items():
        for task, weight in experts.items():
            entry = manifest.expert_set(manifest.task(task).experts or "")
            unit = next(unit for unit in entry.units if unit.layer == layer)
            expert = workshop.repertoire.read_unit(entry, unit, manifest.base)
            for target in FFN_TARGETS:
                update = expert.updates[target]
                linear = model.model.layers[layer].mlp.get_submodule(f"{target}_proj")
                linear.weight.data += weight * expert.scale * update.b @ update.a
    return model


def adapted(done: Exported, folder: Path) -> torch.nn.Module:
    model = load_base(folder, dtype=torch.float32, device=CPU).model
    return peft.PeftModel.from_pretrained(model, done.folder)


def order(folder: Path, **options: str) -> Options:
    return Options(base=folder, **options)  # type: ignore[arg-type]


GIVEN = "red=0.7,green=-0.5,blue=2"
CASES = [
    (
        {"task": "blue", "weights": "uniform"},
        {2: {"red": 1 / 2, "blue": 1 / 2}, 3: {"red": 1 / 3, "green": 1 / 3, "blue": 1 / 3}},
    ),
    ({"task": "green", "weights": "only-own"}, {3: {"green": 1.0}}),
    ({"weights": GIVEN}, {2: {"red": 0.7, "blue": 2.0}, 3: {"red": 0.7, "green": -0.5, "blue": 2.0}}),
]


def test_a_task_with_one_expert_per_layer_is_its_routed_mixture(tasks: Workshop, tiny_base_folder: Path) -> None:
    done = export(tasks.repertoire, "peft", generation=1, options=order(tiny_base_folder, task="red"))
    model = tasks.base.model
    generation = open_generation(tasks.repertoire, 1)
    with attached(model, load_mixture(tasks.repertoire, generation, "red", model)):
        routed = logits(model)
    assert (routed - logits(model)).abs().max() > 0.1
    torch.testing.assert_close(logits(adapted(done, tiny_base_folder)), routed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("options", "weights"), CASES, ids=["uniform", "only-own", "given"])
def test_peft_and_transformers_compute_what_the_weights_say(
    tasks: Workshop, tiny_base_folder: Path, options: dict[str, str], weights: dict[int, dict[str, float]]
) -> None:
    wanted = logits(merged_by_hand(tasks, tiny_base_folder, weights))
    adapter = export(tasks.repertoire, "peft", options=order(tiny_base_folder, **options))
    torch.testing.assert_close(logits(adapted(adapter, tiny_base_folder)), wanted, rtol=1e-4, atol=1e-4)
    merged = export(tasks.repertoire, "merged", options=order(tiny_base_folder, **options))
    plain = transformers.AutoModelForCausalLM.from_pretrained(merged.folder)
    torch.testing.assert_close(logits(plain), wanted, rtol=1e-4, atol=1e-4)
    for done in (adapter, merged):
        assert done.manifest.max_error() < 1e-4
        assert done.manifest.options == options


def test_an_adapter_scales_by_one_everywhere_and_leaves_out_layers_without_experts(
    tasks: Workshop, tiny_base_folder: Path
) -> None:
    done = export(tasks.repertoire, "peft", options=order(tiny_base_folder, weights=GIVEN))
    config = json.loads((done.folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (12, 12)
    layer_3 = {f"model.layers.3.mlp.{target}_proj": 14 for target in FFN_TARGETS}
    assert config["rank_pattern"] == config["alpha_pattern"] == layer_3
    assert config["layers_to_transform"] == [2, 3]
    assert config["target_modules"] == ["down_proj", "gate_proj", "up_proj"]
    facts = done.manifest.files[1].facts["weights"]
    manifest = tasks.repertoire.manifest()
    digests = {task.name: task.experts for task in manifest.tasks}
    assert facts["2"] == {digests["red"]: 0.7, digests["blue"]: 2.0}


def test_a_linear_that_only_some_layers_have_is_named_in_full() -> None:
    update = LowRank(torch.zeros(2, 8), torch.zeros(8, 2))
    config = _config({2: {"gate": update}, 3: {"gate": update, "down": update}}, "tiny")
    names = ["model.layers.2.mlp.gate_proj", "model.layers.3.mlp.down_proj", "model.layers.3.mlp.gate_proj"]
    assert (config.target_modules, config.layers_to_transform) == (names, None)


def test_a_merged_folder_changes_the_experts_linears_alone_and_keeps_the_dtype(
    tmp_path: Path, tiny_base_folder: Path
) -> None:
    folder = tmp_path / "bf16"
    shutil.copytree(tiny_base_folder, folder)
    stored = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    workshop = Workshop(load_base(folder, dtype=torch.float32, device=CPU), Repertoire(tmp_path / "repertoire"))
    workshop.publish("red", "aaaa bbbb cccc")
    done = export(workshop.repertoire, "merged", options=order(folder, task="red"))
    merged = load_file(done.folder / "model.safetensors")
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, stored[name])}
    assert changed == {f"model.layers.{layer}.mlp.{target}_proj.weight" for layer in (2, 3) for target in FFN_TARGETS}
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    for name in ("tokenizer.json", "config.json", "generation_config.json"):
        assert (done.folder / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(("options", "weights"), CASES, ids=["uniform", "only-own", "given"])
def test_a_gguf_adapter_holds_the_updates_under_the_names_of_llama_cpp(
    tasks: Workshop, tiny_base_folder: Path, options: dict[str, str], weights: dict[int, dict[str, float]]
) -> None:
    base = load_base(tiny_base_folder, dtype=torch.float32, device=CPU).model
    wanted = merged_by_hand(tasks, tiny_base_folder, weights)
    done = export(tasks.repertoire, "gguf-lora", options=Options(**options))  # type: ignore[arg-type]
    reader = gguf.GGUFReader(done.folder / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = [fields[key] for key in ("general.type", "general.architecture", "adapter.type")]
    assert kind == ["adapter", "llama", "lora"]
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    assert len(tensors) == 2 * 3 * len(weights)
    for layer in weights:
        for target in FFN_TARGETS:
            a, b = (tensors[f"blk.{layer}.ffn_{target}.weight.lora_{side}"] for side in "ab")
            path = f"model.layers.{layer}.mlp.{target}_proj.weight"
            delta = wanted.get_parameter(path) - base.get_parameter(path)
            torch.testing.assert_close(b @ a * (fields["adapter.lora.alpha"] / len(a)), delta, rtol=1e-4, atol=1e-5)


# ---- what is not written


def test_a_routed_task_without_weights_is_refused(tasks: Workshop, tiny_base_folder: Path) -> None:
    for target, options in (("peft", order(tiny_base_folder)), ("gguf-lora", Options())):
        with pytest.raises(InvalidInputError, match=r"blue.*token by token in layers 2\.\.3, .* give weights"):
            export(tasks.repertoire, target, options=Options(base=options.base, task="blue"))
    assert files_below(tasks.repertoire.root / "exports") == []


@pytest.mark.parametrize(
    ("task", "weights", "message"),
    [
        (None, None, "task=None: name the task"),
        (None, "uniform", "task=None: name the task"),
        ("red", "red=1", "task='red': the weights name their tasks themselves"),
        (None, "red", "must be uniform, only-own or task=weight"),
        (None, "red=", "must be uniform"),
        (None, "red=nan", "must be uniform"),
        (None, "red=0", "must be uniform"),
        (None, "=1", "must be uniform"),
        (None, "red=1,red=2", "names red twice"),
    ],
)
def test_weights_that_cannot_be_used_are_named(
    tasks: Workshop, task: str | None, weights: str | None, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        constant_weights(tasks.repertoire.manifest(), task, weights)


def test_an_unknown_task_is_refused(tasks: Workshop) -> None:
    for task, weights in (("pink", None), (None, "pink=1")):
        with pytest.raises(UnknownTaskError, match="pink"):
            constant_weights(tasks.repertoire.manifest(), task, weights)


def test_another_base_is_refused(tasks: Workshop, tiny_base_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_base_folder, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    for target in ("peft", "merged", "onnx-features"):
        taken = {} if target == "onnx-features" else {"weights": "red=1"}
        with pytest.raises(BaseMismatchError):
            export(tasks.repertoire, target, options=order(other, **taken))
    assert files_below(tasks.repertoire.root / "exports") == []


def test_options_that_a_target_lacks_or_does_not_take_are_named(tasks: Workshop, tiny_base_folder: Path) -> None:
    with pytest.raises(InvalidInputError, match="base=None: target merged needs it"):
        export(tasks.repertoire, "merged", options=Options(task="red"))
    with pytest.raises(InvalidInputError, match="task='red': target onnx-locator does not take it"):
        export(tasks.repertoire, "onnx-locator", options=Options(task="red"))


def change_safetensors(path: Path) -> None:
    tensors = load_file(path)
    name = min(name for name in tensors if "layers.2.mlp" in name)
    tensors[name].view(-1)[3] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})


def change_last_float(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 0x40
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("target", "name", "change"),
    [
        ("peft", "adapter_model.safetensors", change_safetensors),
        ("merged", "model.safetensors", change_safetensors),
        ("gguf-lora", "adapter.gguf", change_last_float),
        ("gguf-lora", "adapter.gguf", lambda path: path.write_bytes(b"no gguf")),
    ],
    ids=["peft", "merged", "gguf", "no gguf"],
)
def test_one_changed_weight_fails_verification_and_leaves_nothing(
    tasks: Workshop, tiny_base_folder: Path, target: str, name: str, change: Callable[[Path], object]
) -> None:
    root = tasks.repertoire.root

    def on_progress(text: str) -> None:
        if "verifying" in text and not changed:
            changed.append(text)
            change(next(root.rglob(f".partial-*/{name}")))

    changed: list[str] = []
    options = Options(base=None if target == "gguf-lora" else tiny_base_folder, weights=GIVEN)
    with pytest.raises(ExportMismatchError, match=name.replace(".", r"\.")):
        export(tasks.repertoire, target, options=options, on_progress=on_progress)
    assert changed
    assert files_below(root / "exports") == []


def test_a_changed_weight_that_no_expert_updates_fails_verification_too(
    tasks: Workshop, tiny_base_folder: Path
) -> None:
    def on_progress(text: str) -> None:
        if text == "verifying the weights":
            path = next(tasks.repertoire.root.rglob(".partial-*/model.safetensors"))
            tensors = load_file(path)
            tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-6
            save_file(tensors, path, metadata={"format": "pt"})

    with pytest.raises(ExportMismatchError, match=r"model\.layers\.0\.mlp\.up_proj\.weight is not the base's"):
        export(tasks.repertoire, "merged", options=order(tiny_base_folder, weights="red=1"), on_progress=on_progress)


def test_mixtures_lie_side_by_side_and_each_is_made_once(tasks: Workshop) -> None:
    def run(**options: str) -> Exported:
        return export(tasks.repertoire, "gguf-lora", options=Options(**options))  # type: ignore[arg-type]

    first, second = run(weights="red=1"), run(weights="red=1,blue=1")
    own = run(task="red", weights="only-own")
    assert len({first.folder, second.folder, own.folder}) == 3
    assert run(weights="red=1").was_there


def test_the_real_base_takes_an_adapter(real_base_folder: Path, tmp_path: Path) -> None:
    base: BaseModel = load_base(real_base_folder, dtype=torch.float32, device=CPU)
    workshop = Workshop(base, Repertoire(tmp_path / "repertoire"))
    workshop.publish("red", "aaaa bbbb cccc", layers=[10, 29])
    workshop.publish("blue", "12 34 56", rank=16, layers=[20])
    done = export(workshop.repertoire, "peft", options=order(real_base_folder, weights="red=0.6,blue=0.4"))
    assert {check.output: check.max_error < 1e-4 for check in done.manifest.files[1].checks} == {
        "updates": True,
        "logits": True,
    }
