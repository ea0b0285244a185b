"""Exports of experts that update attention and of other kinds of routers: written and verified, or refused by name."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers
from exports import quiet, run, sabotage
from repertoires import Workshop

from exporters.onnx_router import write_routers
from exporters.options import Options
from exporters.targets import export
from runtime.errors import ExportMismatchError, InvalidInputError
from runtime.model.generation import open_generation
from runtime.model.manifest import TARGETS
from runtime.model.mixture import weigh

IDS = torch.tensor([[1, 40, 50, 60, 70]])

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft.*")


def order(folder: Path, **fields: str) -> Options:
    return Options(base=folder, **fields)  # type: ignore[arg-type]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("target", ["peft", "merged"])
def test_an_expert_of_all_seven_linears_becomes_an_adapter_and_a_merged_model(
    workshop: Workshop, tiny_base_folder: Path, target: str
) -> None:
    workshop.publish("red", "aaaa", targets=TARGETS, kind="arrow")
    done = export(workshop.repertoire, target, options=order(tiny_base_folder, task="red"))
    expected = workshop.reference("hello", "red", 1)[0]
    ids = torch.tensor([open_generation(workshop.repertoire).template.encode(workshop.base.tokenizer, "hello")])
    if target == "peft":
        model = peft.PeftModel.from_pretrained(copy.deepcopy(workshop.base.model), done.folder)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(done.folder)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[0, -1], expected, rtol=1e-4, atol=1e-4)
    assert done.manifest.max_error() < 1e-4


def test_gguf_takes_updates_of_attention_but_those_whose_rows_llama_cpp_orders_otherwise(
    workshop: Workshop,
) -> None:
    workshop.publish("red", "aaaa", targets=("v", "o", "up"))
    workshop.publish("green", "1234", targets=("q", "up"))
    assert export(workshop.repertoire, "gguf-lora", options=Options(weights="red=1")).manifest.max_error() < 1e-5
    with pytest.raises(InvalidInputError, match="updates of q cannot be written"):
        export(workshop.repertoire, "gguf-lora", options=Options(weights="green=1"))


def test_an_arrow_router_is_exported_with_the_weights_that_torch_gives(workshop: Workshop, tmp_path: Path) -> None:
    workshop.publish("red", "aaaa")
    workshop.publish("green", "1234", kind="arrow", top_k=1)
    generation = open_generation(workshop.repertoire)
    write_routers(generation, tmp_path, quiet)
    mixture, x = generation.mixture("green"), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for layer, router in mixture.routers.items():
        got = run(tmp_path / "green.onnx", x=x, layer=torch.tensor(layer))["weights"]
        torch.testing.assert_close(got, weigh(router, x, kind="arrow", top_k=1))
        assert not torch.equal(got, weigh(router, x, kind="top_k", top_k=1))


def test_a_grouped_router_is_refused_by_name(workshop: Workshop, tiny_base_folder: Path) -> None:
    workshop.publish("red", "aaaa")
    workshop.publish("green", "1234", grouping={"groups": ("a", "b")})
    with pytest.raises(InvalidInputError, match="task green has a router of kind grouped"):
        export(workshop.repertoire, "onnx-router")
    with pytest.raises(InvalidInputError, match="task='green': its router is grouped"):
        export(workshop.repertoire, "peft", options=order(tiny_base_folder, task="green"))
    with pytest.raises(InvalidInputError, match="task green has a router of kind grouped"):
        export(workshop.repertoire, "onnx-model", options=order(tiny_base_folder))


def test_a_model_graph_has_no_slots_for_updates_of_attention(workshop: Workshop, tiny_base_folder: Path) -> None:
    workshop.publish("red", "aaaa", targets=TARGETS)
    with pytest.raises(InvalidInputError, match="task red sees experts of red that update q"):
        export(workshop.repertoire, "onnx-model", options=order(tiny_base_folder))


def test_experts_of_attention_are_exported_beside_those_of_the_ffn(workshop: Workshop, tmp_path: Path) -> None:
    workshop.publish("red", "aaaa")
    plain = export(workshop.repertoire, "onnx-experts")
    assert [file.name for file in plain.manifest.files] == ["gate-up.onnx", "down.onnx"]
    workshop.publish("green", "1234", targets=TARGETS)
    done = export(workshop.repertoire, "onnx-experts")
    assert [file.name for file in done.manifest.files] == ["gate-up.onnx", "down.onnx", "qkv.onnx", "out.onnx"]
    assert done.manifest.max_error() < 1e-4


def test_a_wrong_arrow_router_is_noticed(workshop: Workshop) -> None:
    workshop.publish("red", "aaaa")
    workshop.publish("green", "1234", kind="arrow")
    with pytest.raises(ExportMismatchError):
        export(workshop.repertoire, "onnx-router", on_progress=sabotage(workshop.repertoire.root, "router_weights"))
