"""Exports of experts that update attention and of other kinds of routers: written and verified, or refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
import typer
from engines import ask
from exports import files_below, quiet, run, sabotage
from hyper_tasks import with_hyper
from repertoires import Workshop
from typer.testing import CliRunner

from exporters.mixture_inputs import mixture_inputs
from exporters.model_session import ModelSession
from exporters.onnx_router import write_routers
from exporters.options import Options
from exporters.targets import export
from exporters.verify import open_session, session_providers
from greenroom.cli.export import export as export_command
from runtime.engine.engine import Engine
from runtime.errors import ExportMismatchError, InvalidInputError, UnsupportedDeviceError
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


def test_gguf_orders_the_rows_of_q_and_k_by_head_and_needs_the_base_for_it(
    workshop: Workshop, tiny_base_folder: Path
) -> None:
    workshop.publish("red", "aaaa", targets=("v", "o", "up"))
    workshop.publish("green", "1234", targets=("q", "up"))
    assert export(workshop.repertoire, "gguf-lora", options=Options(weights="red=1")).manifest.max_error() < 1e-5
    with pytest.raises(InvalidInputError, match="base=None: updates of q are ordered by head"):
        export(workshop.repertoire, "gguf-lora", options=Options(weights="green=1"))
    done = export(workshop.repertoire, "gguf-lora", options=order(tiny_base_folder, weights="green=1"))
    reader = gguf.GGUFReader(done.folder / "adapter.gguf")
    stored = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    manifest = workshop.repertoire.manifest()
    entry = manifest.expert_set(manifest.task("green").experts or "")
    expert = workshop.repertoire.read_unit(entry, entry.units[0], manifest.base)
    rows = expert.updates["q"].b.float() * expert.scale
    head = rows.shape[0] // workshop.base.model.config.num_attention_heads
    neighbours = [
        start + half
        for start in range(0, rows.shape[0], head)
        for pair in range(head // 2)
        for half in (pair, pair + head // 2)
    ]
    torch.testing.assert_close(stored["blk.2.attn_q.weight.lora_b"], rows[neighbours])


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


GROUPINGS: dict[str, dict[str, object]] = {
    "input": {"groups": ("a", "b", "a")},
    "static": {"groups": ("a", "b", "b"), "within": "static", "epsilon": 0.3},
    "general": {"groups": ("b", "a"), "share": 0.75, "epsilon": 0.4},
    "request": {"groups": ("a", "a", "b"), "scope": "request", "tau_group": 0.3},
}


def grouped(workshop: Workshop, **grouping: object) -> None:
    workshop.publish("red", "aaaa")
    workshop.publish("green", "1234", layers=(2,))
    workshop.publish("blue", "? ! ?", grouping=grouping)


@pytest.mark.parametrize("kind", GROUPINGS)
def test_a_grouped_router_is_exported_with_the_weights_that_torch_gives(
    workshop: Workshop, tmp_path: Path, kind: str
) -> None:
    grouped(workshop, **GROUPINGS[kind])
    generation = open_generation(workshop.repertoire)
    entries = write_routers(generation, tmp_path, quiet)
    facts = entries[-1].facts
    mixture, x = generation.mixture("blue"), torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    assert len(mixture.routers) == 2
    for layer, router in mixture.routers.items():
        got = run(tmp_path / "blue.onnx", x=x, layer=torch.tensor(layer))["weights"]
        wanted = torch.zeros(9, 3)
        wanted[:, [facts["columns"].index(digest) for digest in router.experts]] = weigh(
            router, x, kind="grouped", top_k=mixture.top_k
        )
        torch.testing.assert_close(got, wanted)
        assert torch.equal(got == 0, wanted == 0)
    assert torch.equal(run(tmp_path / "blue.onnx", x=x, layer=torch.tensor(1))["weights"], torch.zeros(9, 3))
    assert facts["grouping"]["groups"] == list(GROUPINGS[kind]["groups"])  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "constant",
    ["layers", "slots", "group_weights", "group_biases", "open_groups", "router_weights", "router_biases", "members"],
)
def test_any_changed_constant_of_a_grouped_router_fails_verification(workshop: Workshop, constant: str) -> None:
    grouped(workshop, **GROUPINGS["static" if constant == "router_biases" else "input"])  # a shift of all is nothing
    with pytest.raises(ExportMismatchError, match=r"blue\.onnx: "):
        export(
            workshop.repertoire,
            "onnx-router",
            options=Options(task="blue"),
            on_progress=sabotage(workshop.repertoire.root, constant),
        )
    assert files_below(workshop.repertoire.root / "exports") == []


def test_a_general_experts_weight_is_verified(workshop: Workshop) -> None:
    grouped(workshop, **GROUPINGS["general"])
    with pytest.raises(ExportMismatchError, match=r"blue\.onnx: output weights differs"):
        export(
            workshop.repertoire,
            "onnx-router",
            options=Options(task="blue"),
            on_progress=sabotage(workshop.repertoire.root, "constants"),
        )


def test_one_tasks_router_is_exported_alone(workshop: Workshop) -> None:
    grouped(workshop, **GROUPINGS["input"])
    done = export(workshop.repertoire, "onnx-router", options=Options(task="green"))
    assert done.folder.name == "onnx-router.green"
    assert [file.name for file in done.manifest.files] == ["green.onnx"]
    assert done.manifest.skipped == {}


def test_a_fixed_mixture_of_a_grouped_task_needs_weights(workshop: Workshop, tiny_base_folder: Path) -> None:
    grouped(workshop, **GROUPINGS["input"])
    with pytest.raises(InvalidInputError, match="task='blue': its router is grouped"):
        export(workshop.repertoire, "peft", options=order(tiny_base_folder, task="blue"))


# ---- tasks that a target cannot take


def test_a_command_without_a_target_exports_what_each_target_takes_and_names_what_is_left_out(
    workshop: Workshop,
) -> None:
    with_hyper(workshop, "network", top_k=2)
    workshop.publish("blue", "? ! ?", grouping={"groups": ("a", "b", "a")})
    app = typer.Typer()
    app.command()(export_command)
    root = workshop.repertoire.root
    result = CliRunner().invoke(app, ["--repertoire", str(root)])
    assert result.exit_code == 0, result.output
    reason = "it has hyper-adapters beside its experts, which no router weighs"
    assert f"onnx-router: task green is left out: {reason}" in result.stdout.splitlines()
    folder = root / "exports/000004/onnx-router"
    assert {path.name for path in folder.iterdir()} == {"red.onnx", "blue.onnx", "manifest.json"}
    assert json.loads((folder / "manifest.json").read_text())["skipped"] == {"green": reason}
    again = CliRunner().invoke(app, ["--repertoire", str(root)])
    assert "already there" in again.stdout
    assert "task green is left out" in again.stdout


def test_a_task_that_a_target_cannot_take_is_an_error_where_it_is_named(workshop: Workshop) -> None:
    with_hyper(workshop, "network", top_k=2)
    with pytest.raises(InvalidInputError, match="task='green': target onnx-router cannot take it: it has hyper-ada"):
        export(workshop.repertoire, "onnx-router", options=Options(task="green"))
    assert not (workshop.repertoire.root / "exports").exists()


# ---- the whole model


MODELS: dict[str, dict[str, object]] = {
    "arrow": {"kind": "arrow", "top_k": 1, "targets": TARGETS},
    "static": {"grouping": {"groups": ("a", "b"), "within": "static"}, "targets": TARGETS},
    "general": {"grouping": {"groups": ("a",), "share": 0.7}},
    "request": {"grouping": {"groups": ("a", "b"), "scope": "request"}},
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_graph_writes_what_the_engine_writes(
    workshop: Workshop, tiny_base_folder: Path, make_engine: Callable[..., Engine], kind: str
) -> None:
    workshop.publish("red", "aaaa")
    workshop.publish("green", "1234", **MODELS[kind])  # type: ignore[arg-type]
    done = export(workshop.repertoire, "onnx-model", options=order(tiny_base_folder))
    engine, generation = make_engine(workshop), open_generation(workshop.repertoire)
    text = "hello there"
    ids = torch.tensor([generation.template.encode(workshop.base.tokenizer, text)])
    plain = mixture_inputs(workshop.repertoire, generation, [None])
    session, written = ModelSession(done.folder / "model.onnx", plain), []
    for task in ("green", "red", None):
        entering = None
        if kind == "request":
            session.start(plain)
            entering = session.entering(ids)
        session.start(mixture_inputs(workshop.repertoire, generation, [task], entering=entering))
        written.append(session.answer(ids, 64)[0].tolist())
        assert written[-1] == ask(engine, text, max_tokens=64, task=task, base_only=task is None).wait().tokens
    assert written[0] not in written[1:]


def test_sequences_of_all_kinds_share_a_batch(workshop: Workshop, tiny_base_folder: Path) -> None:
    workshop.publish("red", "aaaa", targets=TARGETS)
    workshop.publish("green", "1234", kind="arrow", top_k=1)
    workshop.publish("blue", "? ! ?", grouping={"groups": ("a", "b", "a"), "epsilon": 0.3})
    done = export(workshop.repertoire, "onnx-model", options=order(tiny_base_folder))
    generation, tasks = open_generation(workshop.repertoire), ("blue", None, "green", "red")
    ids = IDS.expand(4, -1)
    path = done.folder / "model.onnx"
    together = ModelSession(path, mixture_inputs(workshop.repertoire, generation, tasks)).step(ids, keep=5)
    for row, task in zip(together, tasks, strict=True):
        alone = ModelSession(path, mixture_inputs(workshop.repertoire, generation, [task])).step(IDS, keep=5)[0]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)


def test_a_file_without_slots_for_a_kind_refuses_it(workshop: Workshop, tiny_base_folder: Path) -> None:
    workshop.publish("red", "aaaa")
    path = export(workshop.repertoire, "onnx-model", options=order(tiny_base_folder)).folder / "model.onnx"
    workshop.publish("green", "1234", targets=TARGETS)
    workshop.publish("blue", "? ! ?", kind="arrow", layers=(2,))
    workshop.publish("grey", "word", grouping={"groups": ("a", "b", "a", "a"), "scope": "request"})
    generation = open_generation(workshop.repertoire)
    session = ModelSession(path, mixture_inputs(workshop.repertoire, generation, ["red"]))
    for task, name in (("green", "k_b"), ("blue", "absolute")):
        with pytest.raises(InvalidInputError, match=f"slots='{name}': the file has none"):
            session.start(mixture_inputs(workshop.repertoire, generation, [task]))
    with pytest.raises(InvalidInputError, match="entering=None: the router of task grey weighs whole prompts"):
        mixture_inputs(workshop.repertoire, generation, ["grey"])


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


# ---- providers


CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def test_cuda_is_chosen_where_onnxruntime_has_it_and_the_cpu_runs_what_it_lacks() -> None:
    assert session_providers("auto", [CUDA, CPU]) == [CUDA, CPU]
    assert session_providers("cuda", [CUDA, CPU]) == [CUDA, CPU]
    assert session_providers("auto", [CPU]) == [CPU]
    assert session_providers("cpu", [CUDA, CPU]) == [CPU]


def test_a_provider_that_is_asked_for_and_missing_is_named() -> None:
    with pytest.raises(UnsupportedDeviceError, match=r"device cuda: this onnxruntime has CPUEx.*onnxruntime-gpu"):
        session_providers("cuda", [CPU])
    with pytest.raises(InvalidInputError, match="device='tpu': must be one of auto, cpu, cuda"):
        session_providers("tpu", [CPU])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is to be missing")
def test_a_file_asked_to_run_on_cuda_says_that_it_cannot_and_runs_elsewhere_where_that_is_left_open(
    workshop: Workshop,
) -> None:
    workshop.publish("red", "aaaa")
    path = export(workshop.repertoire, "onnx-router").folder / "red.onnx"
    with pytest.raises(UnsupportedDeviceError, match="device cuda: "):
        open_session(path, device="cuda")
    assert open_session(path, device="auto").get_providers()[-1] == CPU
