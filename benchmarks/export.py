"""What exported artefacts need: registers, spills, shared memory and roofline of every GPU kernel, without a GPU.

It knows nothing of speed: a roofline is the least time that a card's datasheet allows, not a measurement.
Read first: run it with `python benchmarks/export.py`. Rows go to stdout as JSON and into the key `kernels` of the
results file; other keys of that file stay.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from exporters.triton_artefact import Linear, distinct_variants, shape_name
from exporters.triton_compile import compile_variant
from exporters.triton_roofline import CARDS, estimate

RESULTS = Path(__file__).parent / "results" / "export.json"
SHAPES = {
    8: (Linear(576, 1536, (8,)), Linear(1536, 576, (8,))),  # SmolLM2-135M
    64: (Linear(4096, 14336, (16, 64)), Linear(14336, 4096, (16, 64))),  # Llama-3-8B
}
"""Largest rank -> gate and up, and down, of a base."""


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


def main() -> None:
    """Compile everything, print it, and merge it into the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    output = parser.parse_args().output
    rows = []
    for row in kernel_rows():
        print(json.dumps(row), flush=True)
        rows.append(row)
    results = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    results["kernels"] = rows
    results["kernels_made_by"] = {
        "command": "python benchmarks/export.py",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "workload": "decode: 8 tokens, grouped: 512 tokens; 2 experts per token, 8 different ones",
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows)} kernels in {output}", file=sys.stderr)


if __name__ == "__main__":
    main()
