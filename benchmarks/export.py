"""What exported artefacts need: registers, spills, shared memory and roofline of every GPU kernel, without a GPU.

It knows nothing of speed: a roofline is the least time that a card's datasheet allows, not a measurement.
Read first: run it with `python benchmarks/export.py`. Rows go to stdout as JSON and into the key `kernels` of the
results file; other keys of that file stay. With `--repertoire` it exports every target from a copy instead, and says in
the key `targets` whether each was verified, its largest error, seconds and bytes; with `--data` too, a folder of tasks,
also how well a whole model of each precision answers their held-out rows; and in the key `locate` how soon a fresh
process has located a prompt, and in how much memory. `benchmarks/export_kinds.py` is about routers
of every kind.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import onnxruntime
import torch
import triton
from export_answers import read_rows, score

from exporters.options import PRECISIONS, Options
from exporters.targets import TARGETS, export
from exporters.triton_artefact import Linear, distinct_variants, shape_name
from exporters.triton_compile import compile_variant
from exporters.triton_roofline import CARDS, estimate
from greenroom.cli.places import cache_folder
from runtime.errors import ExportMismatchError
from runtime.model.base import load_base, resolve_base
from runtime.model.repertoire import Repertoire

RESULTS = Path(__file__).parent / "results" / "export.json"
SHAPES = {
    8: (Linear(576, 1536, (8,)), Linear(1536, 576, (8,))),  # SmolLM2-135M
    64: (Linear(4096, 14336, (16, 64)), Linear(14336, 4096, (16, 64))),  # Llama-3-8B
}
"""Largest rank -> gate and up, and down, of a base."""
PROMPT = "3rd of May, 2021"
ROUNDS = 5
LOCATE = """
import time
start = time.monotonic()
import re, sys
from pathlib import Path
from greenroom.locate import PromptLocator
PromptLocator(Path(sys.argv[1])).locate([sys.argv[2]])
seconds = time.monotonic() - start
print(seconds, re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
"""What a gateway does: from the import to the first answer."""
MEASURED = ("agreement", "divergence", "perplexity", "perplexity_torch")
"""Facts of a whole model that belong into its row."""


def kernel_rows() -> Iterator[dict[str, object]]:
    """One row per kernel, architecture and shape, in bfloat16."""
    for largest, shapes in SHAPES.items():
        for variant in distinct_variants(shapes, torch.bfloat16):
            rank = int(variant.constants["BLOCK_R"]) if variant.kernel == "grouped_shrink" else largest
            for arch, card in CARDS.items():
                made = compile_variant(variant, arch)
                yield {
                    "name": variant.kernel,
                    "arch": arch,
                    "shape": shape_name(variant),
                    "rank": rank,
                    "registers": made.registers,
                    "spills": made.spill_bytes,
                    "shared_bytes": made.shared_bytes,
                    "roofline_us": round(estimate(variant, rank, card).least_us, 4),
                }


def target_rows(
    repertoire: Path, base: Path, data: Path | None, per_task: int
) -> Iterator[tuple[str, dict[str, object]]]:
    """Name and row of every target of the current generation; mixtures are the newest task's, uniform."""
    choices = Options(base=base, task=Repertoire(repertoire).manifest().task_names()[-1], weights="uniform")
    with tempfile.TemporaryDirectory() as place:
        copy = Repertoire(shutil.copytree(repertoire, Path(place) / "copy", ignore=shutil.ignore_patterns("exports")))
        for name, target in TARGETS.items():
            takes = target.required | target.optional
            for precision in PRECISIONS if "precision" in takes else (None,):
                chosen = choices.only((takes & set(choices.given())) - {"precision"})
                options = Options(**{**vars(chosen), "precision": precision})
                row: dict[str, object] = {"verified": True}
                try:
                    done = export(copy, name, options=options)
                except ExportMismatchError as error:
                    row = {"verified": False, "error": str(error)}
                else:
                    measured = {key: done.manifest.files[0].facts.get(key) for key in MEASURED}
                    row |= {
                        "max_error": done.manifest.max_error(),
                        "seconds": round(done.seconds, 1),
                        "bytes": done.manifest.num_bytes(),
                        **{key: value for key, value in measured.items() if value is not None},
                    }
                    if precision and data is not None:
                        row["tasks"] = _answers(done.folder / done.manifest.files[0].name, copy, base, data, per_task)
                    shutil.rmtree(done.folder)
                yield options.folder_name(name) if precision else name, row


def _answers(path: Path, repertoire: Repertoire, base: Path, data: Path, per_task: int) -> dict[str, object]:
    held = load_base(base, dtype=torch.float32, device=torch.device("cpu"))
    return dict(score(path, held, repertoire, read_rows(held, repertoire, data, per_task)))


def first_answer(repertoire: Path, base: Path) -> dict[str, object]:
    """Seconds and peak megabytes of fresh processes that locate one prompt: in a program, and by the command."""
    with tempfile.TemporaryDirectory() as place:
        copy = Repertoire(shutil.copytree(repertoire, Path(place) / "copy", ignore=shutil.ignore_patterns("exports")))
        folder = export(copy, "onnx-features", options=Options(base=base)).folder.parent
        export(copy, "onnx-locator")
        command = [sys.executable, "-m", "greenroom.cli.main", "locate", PROMPT, "--repertoire", str(copy.root)]
        timed: dict[str, list[float]] = {"seconds": [], "megabytes": [], "command_seconds": []}
        for _ in range(ROUNDS):
            done = subprocess.run(
                [sys.executable, "-c", LOCATE, str(folder), PROMPT], check=True, capture_output=True, text=True
            )
            seconds, kilobytes = done.stdout.split()
            timed["seconds"].append(float(seconds))
            timed["megabytes"].append(int(kilobytes) / 1000)
            start = time.monotonic()
            subprocess.run(command, check=True, capture_output=True)
            timed["command_seconds"].append(time.monotonic() - start)
    return {name: round(statistics.median(values), 3) for name, values in timed.items()} | {"rounds": ROUNDS}


def main() -> None:
    """Measure one part, print it, and merge it into the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--repertoire", type=Path, help="measure the targets of this repertoire instead of the kernels")
    parser.add_argument("--base", default="smollm2", help="its base, by name or path")
    parser.add_argument("--data", type=Path, help="a folder of the same tasks, to answer their held-out rows")
    parser.add_argument("--rows", type=int, default=100, help="held-out rows of each task")
    arguments = parser.parse_args()
    made_by = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    made_by["triton"] = triton.__version__
    part: dict[str, object]
    if arguments.repertoire is None:
        rows = []
        for row in kernel_rows():
            print(json.dumps(row), flush=True)
            rows.append(row)
        made_by["command"] = "python benchmarks/export.py"
        made_by["workload"] = "decode: 8 tokens, grouped: 512 tokens; 2 experts per token, 8 different ones"
        part = {"kernels": rows, "kernels_made_by": made_by}
    else:
        targets = {}
        place = resolve_base(arguments.base, cache=cache_folder())
        for name, row in target_rows(arguments.repertoire, place, arguments.data, arguments.rows):
            print(json.dumps({name: row}), flush=True)
            targets[name] = row
        tasks = Repertoire(arguments.repertoire).manifest().task_names()
        made_by["command"] = f"python benchmarks/export.py --repertoire DIR --base {Path(arguments.base).name}"
        made_by["workload"] = f"tasks {', '.join(tasks)}; fixed mixtures: {tasks[-1]}, uniform"
        if arguments.data is not None:
            made_by["command"] += f" --data DIR --rows {arguments.rows}"
            made_by["workload"] += f"; {arguments.rows} held-out rows of each task, its own mixture"
        made_by["onnxruntime"] = onnxruntime.__version__
        part = {"targets": targets, "targets_made_by": made_by}
        part["locate"] = first_answer(arguments.repertoire, place)
        print(json.dumps({"locate": part["locate"]}), flush=True)
    results = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {}
    results |= part
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{', '.join(part)} in {arguments.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
