"""The whole model as one graph: it answers as the engine does, for every task, and is not written where it does not.

Read first: expert slots are inputs, so one file answers for all tasks; the engine never sees the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
import typer
from engines import ask
from exports import files_below, sabotage
from repertoires import PROTOTYPES, Workshop
from typer.testing import CliRunner

from exporters.block_codes import decode, encode
from exporters.mixture_inputs import mixture_inputs
from exporters.model_quality import agreement, divergence
from exporters.model_session import ModelSession
from exporters.nibble_codes import decode_nibbles, encode_nibbles
from exporters.options import PRECISIONS, Options
from exporters.targets import Exported, export
from greenroom.cli.export import export as export_command
from runtime.engine.engine import Engine
from runtime.errors import BaseMismatchError, ExportMismatchError, InvalidInputError
from runtime.model.base import load_base
from runtime.model.generation import open_generation
from runtime.model.manifest import FFN_TARGETS
from runtime.model.repertoire import Repertoire

NUM_TOKENS = 64
TASKS = (None, *PROTOTYPES)
PROMPTS = ("hello there", "12 34 ? !", "a much longer prompt, which says nothing in particular")
DOCUMENT = Path(__file__).parent.parent / "docs" / "EXPORT.md"

MakeEngine = Callable[..., Engine]


@pytest.fixture
def done(three_tasks: Workshop, tiny_base_folder: Path) -> Exported:
    """The float32 export of generation 3."""
    return export(three_tasks.repertoire, "onnx-model", options=Options(base=tiny_base_folder))


def slots(workshop: Workshop, *tasks: str | None, number: int | None = None) -> dict[str, torch.Tensor]:
    return mixture_inputs(workshop.repertoire, open_generation(workshop.repertoire, number), tasks)


def encode_prompt(workshop: Workshop, text: str) -> torch.Tensor:
    return torch.tensor([open_generation(workshop.repertoire).template.encode(workshop.base.tokenizer, text)])


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(267, shape, generator=torch.Generator().manual_seed(sum(shape)))


# ---- float32


def test_one_file_answers_as_the_engine_does_for_every_task_and_for_the_plain_base(
    three_tasks: Workshop, done: Exported, make_engine: MakeEngine
) -> None:
    engine = make_engine(three_tasks)
    session = ModelSession(done.folder / "model.onnx", slots(three_tasks, None))
    seen = set()
    for task in TASKS:
        asked = [ask(engine, text, max_tokens=NUM_TOKENS, task=task, base_only=task is None) for text in PROMPTS]
        for text, answer in zip(PROMPTS, asked, strict=True):
            session.start(slots(three_tasks, task))
            got = session.answer(encode_prompt(three_tasks, text), NUM_TOKENS)[0].tolist()
            assert got == answer.wait().tokens
            assert len(got) == NUM_TOKENS
            seen.add(tuple(got))
    assert len(seen) == len(TASKS) * len(PROMPTS)


def test_sequences_of_different_tasks_share_a_batch(three_tasks: Workshop, done: Exported) -> None:
    ids = random_ids(1, 9).expand(len(TASKS), -1)
    together = ModelSession(done.folder / "model.onnx", slots(three_tasks, *TASKS)).step(ids, keep=9)
    for row, task in zip(together, TASKS, strict=True):
        alone = ModelSession(done.folder / "model.onnx", slots(three_tasks, task)).step(ids[:1], keep=9)[0]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)


def test_a_batch_keeps_every_sequences_own_number_of_experts(workshop: Workshop, tiny_base_folder: Path) -> None:
    for name, top_k in (("red", 1), ("green", 1), ("blue", 3)):
        workshop.publish(name, PROTOTYPES[name], top_k=top_k)
    done = export(workshop.repertoire, "onnx-model", options=Options(base=tiny_base_folder))
    ids, packed = random_ids(2, 5), slots(workshop, "green", "blue")
    assert packed["top_k"].tolist() == [1, 3]
    together = ModelSession(done.folder / "model.onnx", packed).step(ids)
    for i, task in enumerate(("green", "blue")):
        alone = ModelSession(done.folder / "model.onnx", slots(workshop, task)).step(ids[i : i + 1])
        torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cut", [1, 2, 11])
def test_continuing_from_the_cache_equals_reading_everything_at_once(
    three_tasks: Workshop, done: Exported, cut: int
) -> None:
    ids = random_ids(2, 12)
    session = ModelSession(done.folder / "model.onnx", slots(three_tasks, "blue", None))
    whole = session.step(ids, keep=12)
    session.start(slots(three_tasks, "blue", None))
    parts = torch.cat([session.step(ids[:, :cut], keep=cut), session.step(ids[:, cut:], keep=12 - cut)], dim=1)
    assert session.num_past == 12
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


def test_only_the_logits_that_are_asked_for_come_back(three_tasks: Workshop, done: Exported) -> None:
    ids = random_ids(1, 6)
    session = ModelSession(done.folder / "model.onnx", slots(three_tasks, "red"))
    whole = session.step(ids, keep=6)
    session.start(slots(three_tasks, "red"))
    last = session.step(ids, keep=2)
    assert last.shape == (1, 2, 267)
    torch.testing.assert_close(last, whole[:, -2:], rtol=1e-4, atol=1e-4)


def test_a_task_that_comes_later_is_fed_to_the_same_file(three_tasks: Workshop, tiny_base_folder: Path) -> None:
    older = export(three_tasks.repertoire, "onnx-model", generation=1, options=Options(base=tiny_base_folder))
    three_tasks.publish("late", "zzzz yyyy", rank=16, layers=[3])
    session = ModelSession(older.folder / "model.onnx", slots(three_tasks, "late"))
    got = session.logits_along(ids := encode_prompt(three_tasks, "hello"), torch.zeros(1, 1, dtype=torch.int64))
    torch.testing.assert_close(got[0], three_tasks.reference("hello", "late", 1), rtol=1e-4, atol=1e-4)
    session.start(slots(three_tasks, None))
    assert (session.step(ids) - got).abs().max() > 0.1


def test_experts_in_every_layer_are_fed_as_well(tmp_path: Path, three_tasks: Workshop, tiny_base_folder: Path) -> None:
    deep = Workshop(three_tasks.base, Repertoire(tmp_path / "deep"), first_layer=0)
    deep.publish("red", PROTOTYPES["red"])
    done = export(deep.repertoire, "onnx-model", options=Options(base=tiny_base_folder))
    got = ModelSession(done.folder / "model.onnx", slots(deep, "red")).step(encode_prompt(deep, "hello"))
    torch.testing.assert_close(got[0], deep.reference("hello", "red", 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_base_whose_head_is_its_embedding_has_the_table_once(
    tmp_path: Path, tiny_base_folder: Path, done: Exported, precision: str
) -> None:
    tied = load_base(tiny_base_folder, dtype=torch.float32, device=torch.device("cpu"))
    tied.model.config.tie_word_embeddings = True
    tied.model.tie_weights()
    tied.model.save_pretrained(tmp_path / "tied")
    tied.tokenizer.save_pretrained(tmp_path / "tied")
    base = load_base(tmp_path / "tied", dtype=torch.float32, device=torch.device("cpu"))
    workshop = Workshop(base, Repertoire(tmp_path / "of-tied"))
    workshop.publish("red", PROTOTYPES["red"])
    smaller = export(workshop.repertoire, "onnx-model", options=Options(base=tmp_path / "tied", precision=precision))
    assert smaller.manifest.num_bytes() < done.manifest.num_bytes() - 4 * 200 * 64
    got = ModelSession(smaller.folder / "model.onnx", slots(workshop, "red")).step(encode_prompt(workshop, "hello"))
    tolerance = 1e-4 if precision == "float32" else 0.1
    torch.testing.assert_close(got[0], workshop.reference("hello", "red", 1), rtol=tolerance, atol=tolerance)


def test_an_expert_that_several_tasks_of_a_batch_see_is_packed_once(three_tasks: Workshop) -> None:
    packed = slots(three_tasks, "green", "blue", None)
    assert packed["router"].shape == (2, 5, 64)  # green's two columns and blue's three
    for target in FFN_TARGETS:
        assert packed[f"{target}_a"].shape[:2] == (2, 4 + 2 + 8)
    assert packed["allowed"].sum(2).tolist() == [[2, 3, 0], [2, 3, 0]]


def test_the_manifest_describes_the_graph_and_what_was_measured(done: Exported) -> None:
    graph, weights = done.manifest.files
    shapes = {spec.name: (spec.dtype, spec.shape) for spec in (*graph.inputs, *graph.outputs)}
    assert shapes["ids"] == ("int64", ("B", "T"))
    assert shapes["past_keys"] == ("float32", (4, "B", 2, "P", 16))
    assert shapes["gate_a"] == ("float32", (2, "S_gate", 64))
    assert shapes["down_b"] == ("float32", (2, "S_down", 64))
    assert shapes["allowed"] == ("bool", (2, "B", "C"))
    assert shapes["logits"] == ("float32", ("B", "K", 267))
    assert [(check.output, check.rows) for check in graph.checks] == [("logits", 512), ("tokens", 512)]
    assert (graph.facts["precision"], graph.facts["first_layer"], graph.facts["agreement"]) == ("float32", 2, 1.0)
    assert graph.facts["perplexity"] == pytest.approx(graph.facts["perplexity_torch"], rel=1e-5)
    assert (weights.name, weights.opset) == ("model.bin", None)
    assert weights.bytes > 4 * (2 * 267 * 64 + 4 * 3 * 128 * 64)  # embedding and head, and the FFNs of 4 layers


# ---- int8 and int4


@pytest.mark.parametrize(("precision", "kl", "share"), [("int8", 0.002, 0.55), ("int4", 0.1, 0.5)])
def test_coded_weights_are_smaller_and_close(
    three_tasks: Workshop, tiny_base_folder: Path, done: Exported, *, precision: str, kl: float, share: float
) -> None:
    coded = export(three_tasks.repertoire, "onnx-model", options=Options(base=tiny_base_folder, precision=precision))
    assert (done.folder.name, coded.folder.name) == ("onnx-model", f"onnx-model.{precision}")
    assert coded.manifest.options == {"precision": precision}
    assert coded.manifest.num_bytes() < share * done.manifest.num_bytes()
    ids, packed = random_ids(3, 40), slots(three_tasks, None, "green", "blue")
    wanted, got = (ModelSession(one.folder / "model.onnx", packed).step(ids, keep=40) for one in (done, coded))
    assert 0 < divergence(got, wanted) < kl
    facts = coded.manifest.files[0].facts
    assert facts["perplexity"] == pytest.approx(facts["perplexity_torch"], rel=0.05)
    assert facts["perplexity"] != facts["perplexity_torch"]


def test_fewer_bits_lose_more_and_zeros_nothing() -> None:
    weight = torch.randn(7, 70, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    losses = []
    for rounded in (decode(encode(weight), 70), decode_nibbles(encode_nibbles(weight), 70)):
        assert torch.equal(rounded[3], weight[3])
        losses.append(float((rounded - weight).square().mean().sqrt() / weight.square().mean().sqrt()))
    assert losses[0] < 0.01 < losses[1] < 0.1


def test_divergence_and_agreement_are_those_of_the_definition() -> None:
    wanted, got = torch.tensor([[0.0, 0.0], [0.0, 9.0]]), torch.tensor([[0.0, 1.0], [0.0, 9.0]])
    half = torch.tensor([0.5, 0.5]).double()
    expected = float((half * (half.log() - got[0].double().log_softmax(0))).sum()) / 2
    assert divergence(got, wanted) == pytest.approx(expected)
    assert divergence(wanted, wanted) == 0
    assert agreement(got, wanted) == 0.5


# ---- what is refused


@pytest.mark.parametrize(
    ("precision", "constant"),
    [
        *(("float32", f"l{i}_{name}_weight") for i, name in ((0, "q"), (1, "down"), (3, "ffn_norm"))),
        *(("float32", name) for name in ("inv_freq", "final_norm_weight", "head_weight")),
        ("int8", "l2_gate_scales"),
        ("int8", "embedding_codes"),
        ("int4", "l3_v_codes"),
    ],
)
def test_a_changed_weight_fails_verification_and_leaves_nothing(
    three_tasks: Workshop, tiny_base_folder: Path, precision: str, constant: str
) -> None:
    root = three_tasks.repertoire.root
    with pytest.raises(ExportMismatchError, match=r"model\.onnx: output logits differs .* error .*, tolerance "):
        export(
            three_tasks.repertoire,
            "onnx-model",
            options=Options(base=tiny_base_folder, precision=precision),
            on_progress=sabotage(root, constant),
        )
    assert files_below(root / "exports") == []


def test_weights_that_are_missing_fail_verification(three_tasks: Workshop, tiny_base_folder: Path) -> None:
    root = three_tasks.repertoire.root

    def on_progress(text: str) -> None:
        if "verifying" in text:
            next(root.rglob(".partial-*/model.bin")).unlink()

    with pytest.raises(ExportMismatchError, match=r"model\.onnx: onnxruntime does not take it"):
        export(three_tasks.repertoire, "onnx-model", options=Options(base=tiny_base_folder), on_progress=on_progress)
    assert files_below(root / "exports") == []


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("onnx-model", {}, "base=None: target onnx-model needs it"),
        ("onnx-model", {"base": Path("base"), "precision": "int3"}, "precision='int3': must be one of float32, int8, "),
        ("onnx-model", {"base": Path("base"), "precision": "../int8"}, "precision='../int8': must be one of"),
        ("onnx-model", {"base": Path("base"), "task": "red"}, "task='red': target onnx-model does not take it"),
        ("onnx-router", {"precision": "int8"}, "precision='int8': target onnx-router does not take it"),
    ],
)
def test_wrong_options_are_named(three_tasks: Workshop, target: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        export(three_tasks.repertoire, target, options=Options(**options))  # type: ignore[arg-type]
    assert not (three_tasks.repertoire.root / "exports").exists()


def test_another_base_is_refused(three_tasks: Workshop, tiny_base_folder: Path, tmp_path: Path) -> None:
    other = load_base(tiny_base_folder, dtype=torch.float32, device=torch.device("cpu"))
    other.model.model.norm.weight.add_(1)
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError):
        export(three_tasks.repertoire, "onnx-model", options=Options(base=tmp_path / "other"))
    assert files_below(three_tasks.repertoire.root / "exports") == []


# ---- the folder and the document


def test_naming_the_default_precision_is_the_same_artefact(
    three_tasks: Workshop, tiny_base_folder: Path, done: Exported
) -> None:
    again = export(
        three_tasks.repertoire, "onnx-model", options=Options(base=tiny_base_folder, precision=PRECISIONS[0])
    )
    assert (again.folder, again.was_there) == (done.folder, True)


def test_the_command_takes_a_precision(three_tasks: Workshop, tiny_base_folder: Path) -> None:
    app = typer.Typer()
    app.command()(export_command)
    root = three_tasks.repertoire.root
    words = ["onnx-model", "onnx-router", "--precision", "int8", "--base", tiny_base_folder, "--repertoire", root]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert (root / "exports/000003/onnx-model.int8/model.onnx").is_file()
    assert (root / "exports/000003/onnx-router/red.onnx").is_file()


def test_every_weight_lies_aligned_beside_the_graph(done: Exported) -> None:
    model = onnx.load(done.folder / "model.onnx", load_external_data=False)
    places = [{pair.key: pair.value for pair in tensor.external_data} for tensor in model.graph.initializer]
    assert {place["location"] for place in places} == {"model.bin"}
    assert all(int(place["offset"]) % 4096 == 0 for place in places)


def test_the_documents_snippet_runs(
    three_tasks: Workshop,
    tiny_base_folder: Path,
    done: Exported,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = three_tasks.repertoire.root.parent
    (place / "base").symlink_to(tiny_base_folder)
    monkeypatch.chdir(place)
    section = DOCUMENT.read_text().split("\n## `onnx-model`\n")[1].split("\n## ")[0]
    (snippet,) = re.findall(r"```py\n(.*?)```", section, re.DOTALL)
    exec(compile(snippet, "EXPORT.md", "exec"), {})
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["red", "green"]
    assert done.folder.name in snippet
