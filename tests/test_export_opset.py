"""The opset of exported graphs: one that can be chosen is verified in onnxruntime, and another is refused."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import typer
from repertoires import Workshop
from typer.testing import CliRunner

from exporters.opsets import IR_VERSIONS, OPSET
from exporters.options import Options
from exporters.targets import export
from greenroom.cli.export import export as export_command
from runtime.errors import InvalidInputError

GRAPHS = {
    "onnx-locator": Options(),
    "onnx-router": Options(),
    "onnx-experts": Options(),
    "onnx-features": Options(),
    "onnx-model": Options(precision="int8"),
}


@pytest.mark.parametrize("target", GRAPHS)
def test_a_graph_of_the_newest_opset_is_written_in_it_and_lies_beside_the_default(
    workshop: Workshop, tiny_base_folder: Path, target: str
) -> None:
    workshop.publish("red", "aaaa")
    workshop.publish("blue", "? ! ?", grouping={"groups": ("a", "b"), "epsilon": 0.1})
    newest = max(IR_VERSIONS)
    base = tiny_base_folder if target in ("onnx-features", "onnx-model") else None
    done = export(
        workshop.repertoire, target, options=Options(base=base, precision=GRAPHS[target].precision, opset=newest)
    )
    assert done.folder.name.endswith(f".opset{newest}")
    assert done.manifest.options["opset"] == newest
    graphs = [file for file in done.manifest.files if file.name.endswith(".onnx")]
    assert graphs
    for file in graphs:
        model = onnx.load(done.folder / file.name, load_external_data=False)
        assert (model.ir_version, file.opset) == (IR_VERSIONS[newest], newest)
        assert [one.version for one in model.opset_import if not one.domain] == [newest]
        assert file.checks


@pytest.mark.parametrize("opset", IR_VERSIONS)
def test_every_opset_that_can_be_chosen_is_taken_by_onnxruntime(workshop: Workshop, opset: int) -> None:
    workshop.publish("red", "aaaa")
    workshop.publish("blue", "? ! ?", grouping={"groups": ("a", "b"), "epsilon": 0.1})
    done = export(workshop.repertoire, "onnx-router", options=Options(opset=opset))
    assert [file.opset for file in done.manifest.files] == [opset, opset]


def test_naming_the_default_opset_is_the_same_artefact(workshop: Workshop) -> None:
    workshop.publish("red", "aaaa")
    first = export(workshop.repertoire, "onnx-router")
    again = export(workshop.repertoire, "onnx-router", options=Options(opset=OPSET))
    assert (again.folder, again.was_there) == (first.folder, True)


@pytest.mark.parametrize("opset", [0, 17, 22])
def test_another_opset_is_refused_and_nothing_is_written(workshop: Workshop, opset: int) -> None:
    workshop.publish("red", "aaaa")
    with pytest.raises(InvalidInputError, match=f"opset={opset}: must be one of 18, 19, 20, 21"):
        export(workshop.repertoire, "onnx-router", options=Options(opset=opset))
    assert not (workshop.repertoire.root / "exports").exists()


def test_a_target_without_graphs_takes_no_opset(workshop: Workshop) -> None:
    workshop.publish("red", "aaaa")
    with pytest.raises(InvalidInputError, match="opset='19': target gguf-lora does not take it"):
        export(workshop.repertoire, "gguf-lora", options=Options(weights="red=1", opset=19))


def test_the_command_takes_an_opset(workshop: Workshop) -> None:
    workshop.publish("red", "aaaa")
    app = typer.Typer()
    app.command()(export_command)
    root = workshop.repertoire.root
    result = CliRunner().invoke(app, ["onnx-router", "--opset", "20", "--repertoire", str(root)])
    assert result.exit_code == 0, result.output
    assert (root / "exports/000001/onnx-router.opset20/red.onnx").is_file()
