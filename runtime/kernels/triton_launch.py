"""Runs kernels that were compiled ahead of time, through the CUDA driver: no compiler, no Triton, at run time.

It knows nothing of mixtures; `runtime.kernels.triton_mixture` says what to launch.
Read first: an artefact of the target `triton` is a folder of `.cubin` files and a `manifest.json` with what a launch
must agree with. A kernel is found by name, dtype and constants; what was not exported cannot be launched. A cubin for
sm_80 runs on every card 8.x; those for sm_90 and sm_100 use instructions of exactly 9.0 and 10.0.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.errors import DigestMismatchError, InvalidInputError, ManifestError, UnsupportedDeviceError
from runtime.kernels.cuda_driver import Driver, Parameter
from runtime.kernels.triton_mixture import Launch, Variant

_WARP = 32
_ALIGNMENT = 16
_SCRATCH = (0, 0)  # Triton's kernels end with two pointers to scratch memory, of which ours need none


@dataclass(frozen=True)
class CompiledKernel:
    """One cubin and what a launch must agree with.

    Args:
        cubin: the file's bytes.
        symbol: the kernel's name in it.
        key: `Variant.key` of what was compiled.
        parameters: name -> `i32` or a pointer such as `*bf16`, in order; two null pointers follow them.
        aligned: parameters that were promised to be multiples of 16 (bytes for pointers).
        num_warps: of a program.
        shared_bytes: dynamic shared memory of a program.
    """

    cubin: bytes
    symbol: str
    key: object
    parameters: Mapping[str, str]
    aligned: frozenset[str]
    num_warps: int
    shared_bytes: int


def read_kernels(folder: Path, arch: str) -> tuple[CompiledKernel, ...]:
    """Read an artefact's kernels for one architecture.

    Args:
        folder: with `manifest.json`.
        arch: such as `sm_90`.

    Raises:
        ManifestError: no manifest, or a field is missing.
        DigestMismatchError: a file is not the one that was exported.
        UnsupportedDeviceError: nothing was exported for this architecture.
    """
    kernels, exported = [], set()
    try:
        for entry in json.loads((folder / "manifest.json").read_bytes())["files"]:
            facts = entry["facts"]
            exported.add(facts["arch"])
            if facts["arch"] != arch:
                continue
            cubin = (folder / Path(entry["name"]).name).read_bytes()
            if hashlib.sha256(cubin).hexdigest() != entry["sha256"]:
                raise DigestMismatchError(f"{entry['name']}: its SHA-256 is not that of the manifest")
            constants = tuple(sorted(facts["constants"].items()))
            kernels.append(
                CompiledKernel(
                    cubin=cubin,
                    symbol=facts["kernel"],
                    key=(facts["kernel"], facts["dtype"], constants),
                    parameters={parameter["name"]: parameter["type"] for parameter in facts["parameters"]},
                    aligned=frozenset(facts["aligned"]),
                    num_warps=facts["num_warps"],
                    shared_bytes=facts["shared_bytes"],
                )
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{folder.name}: not an artefact of target triton: {error!r}") from error
    if not kernels:
        raise UnsupportedDeviceError(f"no kernel was exported for {arch}, only for {sorted(exported)}")
    return tuple(kernels)


def arch_of(capability: tuple[int, int]) -> str:
    """The architecture whose cubins run on a card of this compute capability.

    Raises:
        UnsupportedDeviceError: none that we export for.
    """
    if capability[0] == 8:
        return "sm_80"
    if capability in {(9, 0), (10, 0)}:
        return f"sm_{capability[0]}0"
    raise UnsupportedDeviceError(f"compute capability {capability[0]}.{capability[1]}: kernels run on 8.x, 9.0, 10.0")


class CubinLauncher:
    """Launches compiled kernels on one device; loads each of them at once, so that no request waits for it.

    Args:
        kernels: of the device's architecture.
        driver: to load and launch with.
        device: where all tensors lie.
        stream: returns the handle of the stream to queue on.

    Raises:
        UnsupportedDeviceError: the driver refuses a kernel.
    """

    def __init__(
        self,
        kernels: Sequence[CompiledKernel],
        driver: Driver,
        *,
        device: torch.device,
        stream: Callable[[], int],
    ) -> None:
        self._driver, self._device, self._stream = driver, device, stream
        self._loaded = {
            kernel.key: (kernel, driver.load(kernel.cubin, kernel.symbol, kernel.shared_bytes)) for kernel in kernels
        }

    def has(self, variant: Variant) -> bool:
        """Whether a kernel was exported."""
        return variant.key in self._loaded

    def __call__(self, launch: Launch) -> None:
        """Queue one kernel.

        Raises:
            UnsupportedDeviceError: it was not exported.
            InvalidInputError: a tensor lies elsewhere, or what the kernel takes to be a multiple of 16 is none.
        """
        key = launch.variant.key
        if key not in self._loaded:
            raise UnsupportedDeviceError(f"no kernel {key[0]} for {key[1]} with {dict(key[2])} was exported")
        kernel, function = self._loaded[key]
        parameters: list[Parameter] = [
            self._parameter(kernel, name, launch.arguments[name]) for name in kernel.parameters
        ]
        parameters += map(ctypes.c_void_p, _SCRATCH)
        self._driver.launch(
            function,
            grid=launch.grid,
            threads=kernel.num_warps * _WARP,
            shared_bytes=kernel.shared_bytes,
            stream=self._stream(),
            parameters=parameters,
        )

    def _parameter(self, kernel: CompiledKernel, name: str, value: torch.Tensor | int) -> Parameter:
        number = value if isinstance(value, int) else value.data_ptr()
        if name in kernel.aligned and number % _ALIGNMENT:
            raise InvalidInputError(name, number, f"{kernel.symbol} takes multiples of {_ALIGNMENT}")
        if isinstance(value, int):
            return ctypes.c_int32(number)
        if value.device != self._device:
            raise InvalidInputError(name, str(value.device), f"must lie on {self._device}")
        return ctypes.c_void_p(number)


def launcher_for(device: torch.device, folder: Path) -> CubinLauncher | None:
    """How the mixture runs on a device: these kernels on CUDA; None elsewhere, where `add_mixture` does.

    Args:
        device: of the engine; a CUDA device with its index.
        folder: artefact of the target `triton`.

    Raises:
        UnsupportedDeviceError: the device is CUDA, but torch, the driver, the card or the artefact lacks it.
        ManifestError, DigestMismatchError: see `read_kernels`.
    """
    if device.type != "cuda":
        return None
    if not torch.cuda.is_available():
        raise UnsupportedDeviceError(f"device {device}: this build of torch ({torch.__version__}) sees no CUDA device")
    kernels = read_kernels(folder, arch_of(torch.cuda.get_device_capability(device)))
    with torch.cuda.device(device):
        torch.empty(1, device=device)  # makes the context that the driver's calls need
        return CubinLauncher(
            kernels,
            Driver(),
            device=device,
            stream=lambda: int(torch.cuda.current_stream(device).cuda_stream),
        )
