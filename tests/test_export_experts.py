"""The experts' part of an FFN as graphs whose expert weights are inputs: one pair of files for all experts.

Read first: a whole mixed FFN is put together from the base's linears and the two graphs, as a user's runtime would.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exports import files_below, quiet, run
from repertoires import Workshop

from exporters.onnx_experts import DOWN, GATE_UP, expert_case, write_experts
from exporters.options import Source
from exporters.targets import export
from exporters.verify import open_session, verify
from runtime.errors import ExportMismatchError
from runtime.kernels.mixture import pack
from runtime.model.attach import decoder_layers, load_mixture
from runtime.model.expert import Expert, LowRank
from runtime.model.generation import base_ref, open_generation
from runtime.model.manifest import Target


@pytest.fixture
def graphs(three_tasks: Workshop, tmp_path: Path) -> Path:
    """A folder with the two files."""
    source = Source(repertoire=three_tasks.repertoire, generation=open_generation(three_tasks.repertoire))
    folder = tmp_path / "graphs"
    folder.mkdir()
    write_experts(source, folder, quiet)
    return folder


def packed(experts: list[Expert], target: Target) -> dict[str, torch.Tensor]:
    updates = [expert.updates[target] for expert in experts]
    scales = [expert.scale for expert in experts]
    update = pack(
        [u.a for u in updates], [u.b for u in updates], scales, dtype=torch.float32, device=torch.device("cpu")
    )
    return {f"{target}_a": update.a, f"{target}_b": update.b, f"{target}_owner": update.owner}


@pytest.mark.parametrize("num_tokens", [1, 5, 64])
def test_every_tasks_ffn_is_the_bases_linears_and_the_two_graphs(
    three_tasks: Workshop, graphs: Path, num_tokens: int
) -> None:
    base, manifest = three_tasks.base, three_tasks.repertoire.manifest()
    generation = open_generation(three_tasks.repertoire)
    x = torch.randn(num_tokens, base.info.width, generator=torch.Generator().manual_seed(num_tokens))
    for task in manifest.task_names():
        for layer, mixture in load_mixture(three_tasks.repertoire, generation, task, base.model).items():
            ffn = decoder_layers(base.model)[layer].mlp
            entries = [manifest.expert_set(digest) for digest in generation.mixtures[task].routers[layer].experts]
            experts = [
                three_tasks.repertoire.read_unit(entry, unit, manifest.base)
                for entry in entries
                for unit in entry.units
                if unit.layer == layer
            ]
            with torch.no_grad():
                wanted = mixture(x)
                weights = mixture.weights
                inputs = packed(experts, "gate") | packed(experts, "up")
                got = run(graphs / "gate-up.onnx", x=x, weights=weights, **inputs)
                hidden = ffn.act_fn(ffn.gate_proj(x) + got["gate_update"]) * (ffn.up_proj(x) + got["up_update"])
                down = run(graphs / "down.onnx", x=hidden, weights=weights, **packed(experts, "down"))
                torch.testing.assert_close(ffn.down_proj(hidden) + down["down_update"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranks", [(), (1,), (7, 1, 32)])
def test_any_number_of_experts_of_any_rank_goes_in(three_tasks: Workshop, graphs: Path, ranks: tuple[int, ...]) -> None:
    base, generator = base_ref(three_tasks.base.info), torch.Generator().manual_seed(0)

    def update(wide: int, narrow: int, rank: int) -> LowRank:
        return LowRank(torch.randn(rank, wide, generator=generator), torch.randn(narrow, rank, generator=generator))

    wide, ffn = base.width, base.ffn_width
    experts = [
        Expert(2, 0.5, {"gate": update(wide, ffn, r), "up": update(wide, ffn, r + 1), "down": update(ffn, wide, r)})
        for r in ranks
    ]
    for name, targets in (("gate-up.onnx", GATE_UP), ("down.onnx", DOWN)):
        checks = verify(graphs / name, [expert_case(experts, targets, base, 3, generator)])
        assert max(check.max_error for check in checks) < 1e-5


def test_a_linear_that_no_expert_updates_gets_nothing(three_tasks: Workshop, graphs: Path) -> None:
    base, generator = base_ref(three_tasks.base.info), torch.Generator().manual_seed(0)
    only_gate = Expert(2, 1.0, {"gate": LowRank(torch.randn(2, base.width), torch.randn(base.ffn_width, 2))})
    case = expert_case([only_gate], GATE_UP, base, 4, generator)
    got = run(graphs / "gate-up.onnx", **case.inputs)
    assert torch.equal(got["up_update"], torch.zeros(4, base.ffn_width))
    assert got["gate_update"].abs().max() > 0


def test_the_files_hold_no_weights_and_are_the_same_for_every_generation(three_tasks: Workshop) -> None:
    first, second = (export(three_tasks.repertoire, "onnx-experts", generation=number) for number in (1, 3))
    assert [file.sha256 for file in first.manifest.files] == [file.sha256 for file in second.manifest.files]
    assert first.manifest.num_bytes() < 4096
    specs = {spec.name: spec.shape for spec in second.manifest.files[0].inputs}
    assert specs["gate_a"] == ("S_gate", 64)
    assert specs["up_b"] == ("S_up", 128)
    assert specs["up_owner"] == ("S_up",)
    assert (specs["x"], specs["weights"]) == (("T", 64), ("T", "E"))
    assert open_session(second.folder / "down.onnx").get_modelmeta().custom_metadata_map["targets"] == '["down"]'


def test_a_changed_graph_fails_verification_and_leaves_nothing(three_tasks: Workshop) -> None:
    root = three_tasks.repertoire.root

    def on_progress(text: str) -> None:
        if "down.onnx: verifying" in text:
            path = next(root.rglob(".partial-*/down.onnx"))
            path.write_bytes(path.read_bytes().replace(b"Mul\x22", b"Add\x22").replace(b"\x22\x03Mul", b"\x22\x03Add"))

    with pytest.raises(ExportMismatchError, match=r"down\.onnx: output down_update differs"):
        export(three_tasks.repertoire, "onnx-experts", on_progress=on_progress)
    assert files_below(root / "exports") == []
