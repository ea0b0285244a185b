"""Compiles one variant of a mixture kernel to a cubin, without a GPU, and says what it needs of one.

It knows nothing of repertoires or folders.
Read first: Triton translates to PTX, and the assembler that Triton brings along makes the cubin. We run the assembler
ourselves, so that registers and spills are those of exactly the bytes that are returned, and so that these bytes hold
no paths of the machine that made them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from exporters.triton_roofline import CARDS
from runtime.errors import ExportMismatchError, InvalidInputError
from runtime.kernels import triton_kernels
from runtime.kernels.triton_mixture import Variant

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_TYPED = frozenset({"x", "y", "a", "b"})  # pointers of the variant's dtype
_FLOAT = frozenset({"mid", "weights"})
_TABLES = frozenset({"rows", "tiles", "order", "ids", "token_order", "tile_experts", "num_tile_experts"})
_STRIDES = frozenset({"x_stride", "y_stride", "mid_stride"})
_NUM_WARPS = 4
_SCRATCH_POINTERS = 2  # that Triton appends to every kernel
_ELF_MACHINE_CUDA = 190


@dataclass(frozen=True)
class Compiled:
    """A cubin and its needs.

    Args:
        cubin: ELF file with one kernel, named as the variant's.
        arch: such as `sm_90`.
        parameters: name -> type, in order; without Triton's two scratch pointers.
        aligned: names of those that must be multiples of 16 (bytes for pointers).
        num_warps: per program.
        shared_bytes: dynamic shared memory per program.
        registers: per thread.
        spill_bytes: stored to and loaded from local memory per thread because registers ran out.
    """

    cubin: bytes
    arch: str
    parameters: dict[str, str]
    aligned: tuple[str, ...]
    num_warps: int
    shared_bytes: int
    registers: int
    spill_bytes: int


def check_arch(arch: str) -> int:
    """Return the compute capability of an architecture, times ten.

    Raises:
        InvalidInputError: not one that is exported for.
    """
    if arch not in CARDS:
        raise InvalidInputError("arch", arch, f"must be one of {', '.join(CARDS)}")
    return int(arch.removeprefix("sm_"))


def check_dtype(name: str) -> torch.dtype:
    """Return the dtype of this name.

    Raises:
        InvalidInputError: not one that is exported for.
    """
    if name not in DTYPES:
        raise InvalidInputError("dtype", name, f"must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def compile_variant(variant: Variant, arch: str) -> Compiled:
    """Compile a kernel.

    Raises:
        InvalidInputError: unknown architecture or dtype.
        ExportMismatchError: what came out is not a kernel that can be launched as described.
    """
    capability = check_arch(arch)
    if variant.dtype not in _POINTERS:
        raise InvalidInputError("dtype", variant.dtype, f"must be one of {', '.join(DTYPES)}")
    function = JITFunction(getattr(triton_kernels, variant.kernel))
    parameters = {name: _type_of(name, variant.dtype) for name in function.arg_names if name not in variant.constants}
    aligned = tuple(name for name, kind in parameters.items() if kind.startswith("*") or _is_aligned(name, variant))
    places = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    signature = {name: parameters.get(name, "constexpr") for name in function.arg_names}
    source = ASTSource(fn=function, signature=signature, constexprs=dict(variant.constants), attrs=places)
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # or the cubin would name our source files' folder
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": _NUM_WARPS})
    ptx = made.asm["ptx"]
    _check_entry(variant.kernel, ptx, len(parameters) + _SCRATCH_POINTERS)
    if made.metadata.global_scratch_size or made.metadata.profile_scratch_size:
        raise ExportMismatchError(
            f"{variant.kernel} for {arch}: it needs scratch memory, which launching does not give"
        )
    cubin, report = _assemble(ptx, capability)
    _check_cubin(variant.kernel, cubin)
    return Compiled(
        cubin=cubin,
        arch=arch,
        parameters=parameters,
        aligned=aligned,
        num_warps=_NUM_WARPS,
        shared_bytes=made.metadata.shared,
        registers=_number(r"Used (\d+) registers", report),
        spill_bytes=_number(r"(\d+) bytes spill stores", report) + _number(r"(\d+) bytes spill loads", report),
    )


def _type_of(name: str, dtype: torch.dtype) -> str:
    if name in _TYPED:
        return _POINTERS[dtype]
    if name in _FLOAT:
        return "*fp32"
    return "*i32" if name in _TABLES else "i32"


def _is_aligned(name: str, variant: Variant) -> bool:
    return name in _STRIDES and (name == "mid_stride" or int(variant.constants["WIDTH"]) % 16 == 0)


def _assemble(ptx: str, capability: int) -> tuple[bytes, str]:
    with tempfile.TemporaryDirectory() as place:
        source, target = Path(place, "kernel.ptx"), Path(place, "kernel.cubin")
        source.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={sm_arch_from_capability(capability)}"]
        # What Triton passes as well, against a fault of ptxas 13.
        command += ["--regAllocOptLevel=2", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own arguments
        if done.returncode != 0:
            raise ExportMismatchError(f"ptxas rejects the kernel: {done.stderr.strip()[:500]}")
        return target.read_bytes(), done.stderr


def _check_entry(kernel: str, ptx: str, num_parameters: int) -> None:
    entry = re.search(rf"\.entry {kernel}\((.*?)\)", ptx, re.DOTALL)
    found = entry[1].count(".param") if entry else 0
    if found != num_parameters:
        raise ExportMismatchError(f"{kernel}: it takes {found} parameters, {num_parameters} were expected")


def _check_cubin(kernel: str, cubin: bytes) -> None:
    if cubin[:4] != b"\x7fELF" or int.from_bytes(cubin[18:20], "little") != _ELF_MACHINE_CUDA:
        raise ExportMismatchError(f"{kernel}: the assembler's output is no cubin")
    if f".text.{kernel}\0".encode() not in cubin:
        raise ExportMismatchError(f"{kernel}: the cubin has no code of that name")


def _number(pattern: str, report: str) -> int:
    found = re.search(pattern, report)
    if found is None:
        raise ExportMismatchError(f"ptxas reports no {pattern!r}")
    return int(found[1])
