"""Who launches the mixture kernels, and where a step runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime.engine.mixture_launcher import ExportedFirst, mixture_launcher
from runtime.engine.step_model import make_step_model
from runtime.errors import UnsupportedDeviceError
from runtime.kernels.device_choice import device_of
from runtime.kernels.triton_launch import CompiledKernel, CubinLauncher
from runtime.kernels.triton_mixture import Launch, Variant
from runtime.model.base import BaseModel

CPU = torch.device("cpu")
ONE, OTHER = (Variant("decode_expand", torch.float32, {"WIDTH": width}) for width in (16, 32))


class Writing:
    """A driver, and a launcher, that write down what they run."""

    def __init__(self) -> None:
        self.ran: list[object] = []

    def load(self, cubin: bytes, symbol: str, shared_bytes: int) -> int:
        return 1

    def launch(self, function: int, **rest: object) -> None:
        self.ran.append(rest["grid"])

    def __call__(self, launch: Launch) -> None:
        self.ran.append(launch.variant)


def exported(driver: Writing) -> CubinLauncher:
    kernel = CompiledKernel(b"", "decode_expand", ONE.key, {}, frozenset(), 4, 0)
    return CubinLauncher([kernel], driver, device=CPU, stream=lambda: 0)  # type: ignore[arg-type]


def test_exported_kernels_go_first_and_the_compiler_makes_the_others() -> None:
    driver, compiler = Writing(), Writing()
    launch = ExportedFirst(exported(driver), compiler)
    for variant in (ONE, OTHER):
        launch(Launch(variant, (1, 2, 3), {}))
    assert driver.ran == [(1, 2, 3)]
    assert compiler.ran == [OTHER]


def test_without_a_compiler_what_was_not_exported_is_named() -> None:
    launch = ExportedFirst(exported(Writing()), None)
    with pytest.raises(UnsupportedDeviceError, match=r"no kernel decode_expand for float32 with {'WIDTH': 32}"):
        launch(Launch(OTHER, (1, 1, 1), {}))


def test_a_cpu_launches_nothing(tmp_path: Path) -> None:
    assert mixture_launcher(CPU, tmp_path) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without one")
def test_a_gpu_that_is_not_there_is_refused_and_auto_does_without() -> None:
    assert device_of("auto") == device_of("cpu") == CPU
    with pytest.raises(UnsupportedDeviceError, match="sees no CUDA device"):
        device_of("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without one")
def test_serving_on_a_gpu_that_is_not_there_ends_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "greenroom.cli.main", "serve", "--device", "cuda", "--repertoire", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "sees no CUDA device" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_native_step_is_refused_elsewhere_than_on_a_cpu_before_anything_is_built(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    model = tiny_base.model.__class__(tiny_base.model.config).to("meta")
    with pytest.raises(UnsupportedDeviceError, match="the native step runs on a CPU, the base is on meta"):
        make_step_model(model, max_context=32, weights="float32", step="native", folder=tmp_path, threads=1)
    assert list(tmp_path.iterdir()) == []


JIT = """
import torch
from runtime.kernels.mixture import mixture_loop, pack
from runtime.kernels.triton_jit import JitLauncher
from runtime.kernels.triton_metadata import build_metadata
from runtime.kernels.triton_mixture import add_mixture_triton, expert_rows
torch.manual_seed(0)
ranks, scales = (3, 9), (2.0, 0.5)
a, b = [torch.randn(rank, 32) for rank in ranks], [torch.randn(48, rank) for rank in ranks]
rows = expert_rows(pack(a, b, scales, dtype=torch.float32, device=torch.device("cpu")), ranks)
launch = JitLauncher()
for tokens in (2, 40):
    x, y, weights = torch.randn(tokens, 32), torch.zeros(tokens, 48), torch.rand(tokens, 2)
    values, ids = weights.topk(2, dim=1)
    add_mixture_triton(y, x, rows, build_metadata(ids, values, 2), launch)
    torch.testing.assert_close(y, mixture_loop(x, a, b, scales, weights), rtol=1e-4, atol=1e-4)
print("equal")
"""


def test_tritons_own_launcher_takes_every_kernel_for_few_and_many_tokens() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", JIT], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.stdout == "equal\n", done.stderr
