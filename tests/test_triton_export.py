"""Target `triton`: kernels compiled without a GPU, what the files say of themselves, and that a launch fits them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from repertoires import Workshop

pytest.importorskip("triton", reason="Triton exists for Linux on x86-64 alone")

from triton.backends.nvidia.compiler import get_ptxas

from exporters import triton_compile
from exporters.options import Options
from exporters.targets import export
from exporters.triton_artefact import Linear, distinct_variants, linears
from exporters.triton_compile import DTYPES, compile_variant
from exporters.triton_roofline import CARDS, Workload, estimate
from runtime.errors import ExportMismatchError, InvalidInputError, UnsupportedDeviceError
from runtime.kernels.mixture import pack
from runtime.kernels.triton_launch import CubinLauncher, read_kernels
from runtime.kernels.triton_metadata import build_metadata
from runtime.kernels.triton_mixture import (
    Variant,
    add_mixture_triton,
    decode_shrink_variant,
    expert_rows,
    grouped_expand_variant,
    grouped_shrink_variant,
)

CPU = torch.device("cpu")
SMALL = Linear(64, 128, (4,))


def resources(cubin: bytes, folder: Path) -> str:
    """What CUDA's own tool reads from a cubin."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(get_ptxas(80).path).with_name("cuobjdump")
    done = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
    return done.stdout


# ---- compiling


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("arch", CARDS)
def test_every_kernel_compiles_for_every_card_without_spilling(arch: str, dtype: torch.dtype) -> None:
    for variant in distinct_variants([SMALL], dtype):
        made = compile_variant(variant, arch)
        assert made.cubin.startswith(b"\x7fELF")
        assert f".text.{variant.kernel}\0".encode() in made.cubin
        assert (made.arch, made.spill_bytes) == (arch, 0)
        assert 16 <= made.registers <= 255
        assert 0 <= made.shared_bytes <= 48 * 1024


@pytest.mark.parametrize("bucket", [8, 16, 32, 64])
def test_every_rank_bucket_compiles(bucket: int) -> None:
    assert compile_variant(grouped_shrink_variant(576, bucket, torch.bfloat16), "sm_90").spill_bytes == 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_cudas_own_tool_finds_the_kernel_and_the_registers_that_we_report(tmp_path: Path, arch: str) -> None:
    made = compile_variant(grouped_expand_variant(64, torch.bfloat16), arch)
    text = resources(made.cubin, tmp_path)
    assert "Function grouped_expand:" in text
    assert f"REG:{made.registers} STACK:0" in text


def test_compiling_again_gives_the_same_bytes_and_they_name_no_folder() -> None:
    first, second = (compile_variant(decode_shrink_variant(64, torch.float16), "sm_90") for _ in range(2))
    assert first == second
    assert str(Path(__file__).parent.parent).encode() not in first.cubin


def test_the_parameters_are_the_kernels_without_its_constants() -> None:
    made = compile_variant(decode_shrink_variant(64, torch.bfloat16), "sm_80")
    assert made.parameters == {
        "mid": "*fp32",
        "x": "*bf16",
        "a": "*bf16",
        "rows": "*i32",
        "ids": "*i32",
        "weights": "*fp32",
        "num_columns": "i32",
        "x_stride": "i32",
        "mid_stride": "i32",
    }
    assert set(made.aligned) == set(made.parameters) - {"num_columns"}
    odd = compile_variant(decode_shrink_variant(60, torch.bfloat16), "sm_80")
    assert "x_stride" not in odd.aligned


def test_an_unknown_architecture_or_dtype_is_named() -> None:
    with pytest.raises(InvalidInputError, match="arch='sm_70': must be one of sm_80, sm_90, sm_100"):
        compile_variant(decode_shrink_variant(64, torch.float16), "sm_70")
    with pytest.raises(InvalidInputError, match=r"dtype=torch\.int8: must be one of bfloat16"):
        compile_variant(Variant("decode_shrink", torch.int8, {}), "sm_80")


def test_what_is_no_kernel_of_that_name_is_refused() -> None:
    made = compile_variant(decode_shrink_variant(64, torch.float16), "sm_90")
    with pytest.raises(ExportMismatchError, match="decode_expand: the cubin has no code of that name"):
        triton_compile._check_cubin("decode_expand", made.cubin)
    with pytest.raises(ExportMismatchError, match="decode_shrink: the assembler's output is no cubin"):
        triton_compile._check_cubin("decode_shrink", b"\x7fELF" + bytes(60))
    with pytest.raises(ExportMismatchError, match="f: it takes 1 parameters, 2 were expected"):
        triton_compile._check_entry("f", ".entry f(\n.param .u64 f_param_0\n)", 2)
    with pytest.raises(ExportMismatchError, match="ptxas rejects the kernel"):
        triton_compile._assemble("no ptx", 90)


# ---- the estimate


def test_the_roofline_is_bytes_over_bandwidth_where_memory_bounds_it() -> None:
    load = Workload(num_tokens=1, num_columns=2, num_experts=8)
    floor = estimate(decode_shrink_variant(100, torch.bfloat16), 8, CARDS["sm_80"], load)
    # Two experts of 8 rows, one token, two intermediates of 8 float32, two ids and weights.
    assert floor.num_bytes == (2 * 8 + 1) * 100 * 2 + 2 * (8 * 4 + 8)
    assert floor.num_operations == 2 * 2 * 8 * 100
    assert floor.least_us == pytest.approx(floor.num_bytes / 2039e9 * 1e6)


def test_the_roofline_is_operations_over_peak_where_arithmetic_bounds_it() -> None:
    load = Workload(num_tokens=8192, num_columns=8, num_experts=1)
    floor = estimate(grouped_expand_variant(4096, torch.bfloat16), 512, CARDS["sm_100"], load)
    assert floor.least_us == pytest.approx(2 * 8192 * 8 * 512 * 4096 / 2250e12 * 1e6)


# ---- the artefact


def test_the_shapes_are_those_of_the_generations_experts(workshop: Workshop) -> None:
    workshop.publish("red", "aaaa", rank=4)
    manifest = workshop.publish("green", "1234", rank=20)
    assert linears(manifest) == (Linear(64, 128, (4, 20)), Linear(128, 64, (4, 20)))
    with pytest.raises(InvalidInputError, match="it holds no expert"):
        linears(manifest.model_copy(update={"experts": ()}))


class WritingDriver:
    """Counts the parameters of what it is told to launch."""

    def __init__(self) -> None:
        self.symbols: list[str] = []
        self.launched: list[tuple[str, int]] = []

    def load(self, cubin: bytes, symbol: str, shared_bytes: int) -> int:
        self.symbols.append(symbol)
        return len(self.symbols) - 1

    def launch(self, function: int, *, parameters: list[Any], **rest: Any) -> None:
        self.launched.append((self.symbols[function], len(parameters)))


def test_what_was_exported_is_what_a_launch_looks_for(three_tasks: Workshop) -> None:
    done = export(three_tasks.repertoire, "triton", options=Options(arch="sm_90", dtype="bfloat16"))
    names = [file.name for file in done.manifest.files]
    assert len(names) == 8
    assert set(names) == {path.name for path in done.folder.iterdir()} - {"manifest.json"}
    assert all(file.checks and file.opset is None for file in done.manifest.files)
    driver = WritingDriver()
    kernels = read_kernels(done.folder, "sm_90")
    launch = CubinLauncher(kernels, driver, device=CPU, stream=lambda: 0)  # type: ignore[arg-type]
    dtype, ranks = torch.bfloat16, [4, 4, 4]
    for width, out_width in ((64, 128), (128, 64)):
        a = [torch.zeros(rank, width, dtype=dtype) for rank in ranks]
        b = [torch.zeros(out_width, rank, dtype=dtype) for rank in ranks]
        experts = expert_rows(pack(a, b, [1.0] * 3, dtype=dtype, device=CPU), ranks)
        for num_tokens in (3, 33):
            ids = torch.zeros(num_tokens, 2, dtype=torch.int64)
            y, x = torch.zeros(num_tokens, out_width, dtype=dtype), torch.zeros(num_tokens, width, dtype=dtype)
            add_mixture_triton(y, x, experts, build_metadata(ids, torch.ones(ids.shape), 3), launch)
    counts = [("decode_shrink", 11), ("decode_expand", 11), ("grouped_shrink", 14), ("grouped_expand", 16)]
    assert driver.launched == counts * 2


def test_the_manifest_says_what_a_kernel_needs_and_how_it_was_checked(three_tasks: Workshop) -> None:
    done = export(three_tasks.repertoire, "triton", options=Options(arch="sm_80", dtype="float16"))
    (entry,) = (file for file in done.manifest.files if file.name == "grouped_shrink-sm_80-w64-r8-float16.cubin")
    made = compile_variant(grouped_shrink_variant(64, 8, torch.float16), "sm_80")
    assert (done.folder / entry.name).read_bytes() == made.cubin
    assert entry.facts["registers"] == made.registers
    assert entry.facts["shared_bytes"] == made.shared_bytes
    assert {"kernel", "arch", "dtype", "constants", "parameters", "aligned", "num_warps", "spill_bytes"} <= set(
        entry.facts
    )
    (check,) = entry.checks
    assert (check.output, check.sizes) == ("y", (64,))
    assert json.loads((done.folder / "manifest.json").read_text())["options"] == {"arch": "sm_80", "dtype": "float16"}
    assert not done.was_there
    assert export(three_tasks.repertoire, "triton", options=Options(arch="sm_80", dtype="float16")).was_there


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(arch="sm_70"), "arch='sm_70': must be one of sm_80, sm_90, sm_100"),
        (Options(dtype="int8"), "dtype='int8': must be one of bfloat16, float16, float32"),
        (Options(task="red"), "task='red': target triton does not take it"),
    ],
)
def test_a_wrong_option_leaves_no_file(three_tasks: Workshop, options: Options, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        export(three_tasks.repertoire, "triton", options=options)
    exports = three_tasks.repertoire.root / "exports"
    assert [path for path in exports.rglob("*") if path.is_file() and path.name != ".writer-lock"] == []


def test_a_machine_without_triton_says_so(three_tasks: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UnsupportedDeviceError, match="target triton needs the package triton"):
        export(three_tasks.repertoire, "triton")


def test_the_snippet_of_the_document_runs(
    three_tasks: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export(three_tasks.repertoire, "triton", options=Options(arch="sm_90", dtype="bfloat16"))
    monkeypatch.chdir(three_tasks.repertoire.root.parent)
    document = (Path(__file__).parent.parent / "docs" / "EXPORT.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```py\n(.*?)```", document.partition("## `triton`")[2].partition("\n## ")[0], re.DOTALL)
    exec(compile(snippet, "EXPORT.md", "exec"), {})
    *kernels, difference = capsys.readouterr().out.splitlines()
    assert len(kernels) == 8
    assert all("registers, 0 bytes spilled" in line for line in kernels)
    assert float(difference.rpartition(" ")[2]) < 0.1
