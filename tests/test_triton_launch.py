"""Launching compiled kernels: what is read, what is refused, and what reaches the driver.

It does not know a GPU; a driver that writes down its calls is passed in.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.errors import DigestMismatchError, InvalidInputError, ManifestError, UnsupportedDeviceError
from runtime.kernels.cuda_driver import Driver
from runtime.kernels.triton_launch import CubinLauncher, arch_of, launcher_for, read_kernels
from runtime.kernels.triton_mixture import Launch, Variant

CPU = torch.device("cpu")
VARIANT = Variant("decode_expand", torch.bfloat16, {"WIDTH": 64, "BLOCK_H": 32})
FACTS: dict[str, Any] = {
    "kernel": "decode_expand",
    "arch": "sm_90",
    "dtype": "bfloat16",
    "constants": {"BLOCK_H": 32, "WIDTH": 64},
    "parameters": [{"name": "y", "type": "*bf16"}, {"name": "count", "type": "i32"}, {"name": "stride", "type": "i32"}],
    "aligned": ["y", "stride"],
    "num_warps": 4,
    "shared_bytes": 1024,
}


class WritingDriver:
    """Writes down what it is told to load and launch."""

    def __init__(self) -> None:
        self.loaded: list[tuple[bytes, str, int]] = []
        self.launched: list[dict[str, Any]] = []

    def load(self, cubin: bytes, symbol: str, shared_bytes: int) -> int:
        self.loaded.append((cubin, symbol, shared_bytes))
        return len(self.loaded)

    def launch(self, function: int, *, parameters: list[Any], **rest: Any) -> None:
        values = [(type(parameter), parameter.value) for parameter in parameters]
        self.launched.append({"function": function, "parameters": values, **rest})


def write_artefact(folder: Path, *facts: dict[str, Any]) -> Path:
    files = []
    for number, fact in enumerate(facts):
        data = b"cubin %d" % number
        (folder / f"{number}.cubin").write_bytes(data)
        files.append({"name": f"{number}.cubin", "sha256": hashlib.sha256(data).hexdigest(), "facts": fact})
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return folder


def launcher(folder: Path, driver: WritingDriver) -> CubinLauncher:
    return CubinLauncher(read_kernels(folder, "sm_90"), driver, device=CPU, stream=lambda: 77)  # type: ignore[arg-type]


def test_the_driver_gets_the_parameters_in_order_and_two_null_pointers_behind_them(tmp_path: Path) -> None:
    driver = WritingDriver()
    launch = launcher(write_artefact(tmp_path, FACTS), driver)
    y = torch.zeros(4, 64, dtype=torch.bfloat16)
    launch(Launch(VARIANT, (4, 2, 1), {"stride": 64, "y": y, "count": 3}))
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    assert driver.loaded == [(b"cubin 0", "decode_expand", 1024)]
    assert driver.launched == [
        {
            "function": 1,
            "grid": (4, 2, 1),
            "threads": 128,
            "shared_bytes": 1024,
            "stream": 77,
            "parameters": [(pointer, y.data_ptr()), (number, 3), (number, 64), (pointer, None), (pointer, None)],
        }
    ]


def test_only_the_kernels_of_the_cards_architecture_are_loaded(tmp_path: Path) -> None:
    driver = WritingDriver()
    launcher(write_artefact(tmp_path, {**FACTS, "arch": "sm_80"}, FACTS), driver)
    assert [cubin for cubin, *_ in driver.loaded] == [b"cubin 1"]


def test_what_a_kernel_takes_to_be_a_multiple_of_16_is_checked(tmp_path: Path) -> None:
    driver = WritingDriver()
    launch = launcher(write_artefact(tmp_path, FACTS), driver)
    y = torch.zeros(5, 64, dtype=torch.bfloat16)
    with pytest.raises(InvalidInputError, match="stride=65: decode_expand takes multiples of 16"):
        launch(Launch(VARIANT, (1, 1, 1), {"stride": 65, "y": y, "count": 3}))
    with pytest.raises(InvalidInputError, match=r"y=\d+: decode_expand takes multiples of 16"):
        launch(Launch(VARIANT, (1, 1, 1), {"stride": 64, "y": y[:, 1:], "count": 3}))
    with pytest.raises(InvalidInputError, match="y='meta': must lie on cpu"):
        launch(Launch(VARIANT, (1, 1, 1), {"stride": 64, "y": y.to("meta"), "count": 3}))
    assert driver.launched == []


@pytest.mark.parametrize(
    "variant",
    [
        Variant("decode_shrink", torch.bfloat16, VARIANT.constants),
        Variant("decode_expand", torch.float16, VARIANT.constants),
        Variant("decode_expand", torch.bfloat16, {"WIDTH": 128, "BLOCK_H": 32}),
    ],
)
def test_a_kernel_that_was_not_exported_is_named(tmp_path: Path, variant: Variant) -> None:
    launch = launcher(write_artefact(tmp_path, FACTS), WritingDriver())
    with pytest.raises(UnsupportedDeviceError, match=r"no kernel decode_\w+ for \w+ with \{.*\} was exported"):
        launch(Launch(variant, (1, 1, 1), {}))


def test_a_changed_or_missing_file_is_not_loaded(tmp_path: Path) -> None:
    write_artefact(tmp_path, FACTS)
    (tmp_path / "0.cubin").write_bytes(b"other")
    with pytest.raises(DigestMismatchError, match=r"0\.cubin"):
        read_kernels(tmp_path, "sm_90")
    (tmp_path / "0.cubin").unlink()
    with pytest.raises(ManifestError, match="not an artefact of target triton"):
        read_kernels(tmp_path, "sm_90")


def test_a_folder_that_is_no_artefact_is_refused(tmp_path: Path) -> None:
    for text in ("no json", "[]", '{"files": [{"name": "x"}]}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ManifestError, match="not an artefact of target triton"):
            read_kernels(tmp_path, "sm_90")


def test_a_file_name_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "artefact"
    folder.mkdir()
    write_artefact(folder, FACTS)
    (folder / "0.cubin").rename(tmp_path / "0.cubin")
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("0.cubin", "../0.cubin"))
    with pytest.raises(ManifestError):
        read_kernels(folder, "sm_90")


def test_an_architecture_that_was_not_exported_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedDeviceError, match=r"for sm_100, only for \['sm_90'\]"):
        read_kernels(write_artefact(tmp_path, FACTS), "sm_100")


def test_a_card_runs_the_kernels_of_its_generation() -> None:
    assert [arch_of(card) for card in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0))] == ["sm_80"] * 3 + ["sm_90", "sm_100"]
    for card in ((7, 5), (10, 3), (12, 0)):
        with pytest.raises(UnsupportedDeviceError, match=rf"compute capability {card[0]}\.{card[1]}"):
            arch_of(card)


def test_a_cpu_is_not_launched_on(tmp_path: Path) -> None:
    assert launcher_for(CPU, tmp_path / "absent") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedDeviceError, match=r"device cuda:0: this build of torch \(.*\) sees no CUDA device"):
        launcher_for(torch.device("cuda:0"), tmp_path)


def test_a_missing_driver_is_named() -> None:
    with pytest.raises(UnsupportedDeviceError, match=r"the CUDA driver cannot be loaded: libabsent\.so\.1"):
        Driver("libabsent.so.1")


# A library with the driver's functions, which writes down what it is called with and fails where it is told to.
STUB = """
#include <stdint.h>
#include <string.h>
int64_t seen[16];
int cuModuleLoadData(void **module, const char *image) {
    *module = (void *)16;
    return memcmp(image, "cubin\\0image", 11) ? 200 : 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = (void *)32;
    return module != (void *)16 || strcmp(name, "kernel") ? 500 : 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
    seen[0] = attribute;
    seen[1] = value;
    return function != (void *)32;
}
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    int64_t values[] = {(int64_t)function, x, y, z, bx, by, bz, shared, (int64_t)stream,
                        *(int64_t *)parameters[0], *(int32_t *)parameters[1], extra == 0};
    memcpy(seen + 2, values, sizeof values);
    return 0;
}
int cuGetErrorString(int code, const char **text) {
    *text = "stub says no";
    return 0;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for a library to call")
def test_the_drivers_functions_are_called_with_what_they_take(tmp_path: Path) -> None:
    (tmp_path / "stub.c").write_text(STUB)
    library = tmp_path / "libstub.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "stub.c"], check=True)
    driver = Driver(str(library))
    function = driver.load(b"cubin\0image", "kernel", 100_000)
    address = 2**40 + 3
    driver.launch(
        function,
        grid=(5, 6, 7),
        threads=128,
        shared_bytes=100_000,
        stream=2**33,
        parameters=[ctypes.c_void_p(address), ctypes.c_int32(-9)],
    )
    seen = (ctypes.c_int64 * 16).in_dll(ctypes.CDLL(str(library)), "seen")
    assert seen[:14] == [8, 100_000, 32, 5, 6, 7, 128, 1, 1, 100_000, 2**33, address, -9, 1]
    with pytest.raises(UnsupportedDeviceError, match="cuModuleLoadData: CUDA error 200, stub says no"):
        driver.load(b"other image", "kernel", 0)
    with pytest.raises(UnsupportedDeviceError, match="cuModuleGetFunction: CUDA error 500, stub says no"):
        driver.load(b"cubin\0image", "other", 0)
