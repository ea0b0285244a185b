"""Builds the native step from its C++ sources with the machine's compiler, and keeps the result on disk.

It does not know what the code computes.
Read first: the file's name holds a digest of sources, flags, compiler and CPU, so nothing stale is ever loaded; two
processes that build at once write the same bytes under different temporary names.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Literal

from runtime.errors import UnsupportedDeviceError

SOURCES = Path(__file__).parent / "native"
# The compiler's own AVX-512 header trips the warning that is off.
FLAGS = ("-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Wno-uninitialized")
VectorKind = Literal["avx512", "avx2"]
NEEDED: dict[VectorKind, frozenset[str]] = {
    "avx512": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"}),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
}
"""What a CPU must have for each kind of vectors, the fastest first."""
LIMIT_S = 300


def cpu_flags() -> frozenset[str]:
    """Names of the CPU's instruction sets as Linux gives them; empty where it does not."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return frozenset()
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def vector_kinds() -> list[VectorKind]:
    """The kinds of vectors that this CPU has, the fastest first."""
    flags = cpu_flags()
    return [kind for kind, needed in NEEDED.items() if needed <= flags]


def build(folder: Path, *, compiler: str = "g++", vectors: VectorKind | None = None) -> Path:
    """The shared library, compiled now unless `folder` holds it already.

    Args:
        folder: where libraries are kept; made if missing.
        compiler: a GCC-like C++ compiler on the PATH.
        vectors: the kind to compute with; the fastest that the CPU has if none is given.

    Raises:
        UnsupportedDeviceError: the CPU lacks an instruction set, there is no compiler, or it fails; says which.
    """
    flags = cpu_flags()
    fastest: list[VectorKind] = [*vector_kinds(), "avx2"]
    wanted = vectors or fastest[0]
    missing = sorted(NEEDED[wanted] - flags)
    if missing:
        raise UnsupportedDeviceError(f"the CPU lacks {', '.join(missing)}")
    path = shutil.which(compiler)
    if path is None:
        raise UnsupportedDeviceError(f"there is no compiler {compiler!r} on the PATH")
    command = [path, *FLAGS, f"-DGR_{wanted.upper()}"]
    library = folder / f"step-{_digest(command, flags)}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _compile(command, library)
    return library


def _compile(command: list[str], library: Path) -> None:
    handle, name = tempfile.mkstemp(dir=library.parent, prefix=library.stem, suffix=".tmp")
    os.close(handle)
    made = Path(name)
    try:
        whole = [*command, str(SOURCES / "step.cpp"), "-o", str(made)]
        done = subprocess.run(whole, capture_output=True, text=True, timeout=LIMIT_S, check=False)  # noqa: S603 - ours
        if done.returncode:
            raise UnsupportedDeviceError(f"{command[0]} failed: {done.stderr.strip()[:2000]}")
        made.replace(library)
    except subprocess.TimeoutExpired as error:
        raise UnsupportedDeviceError(f"{command[0]} took more than {LIMIT_S} s") from error
    finally:
        made.unlink(missing_ok=True)


def _digest(command: list[str], flags: frozenset[str]) -> str:
    asked = [command[0], "--version"]
    version = subprocess.run(asked, capture_output=True, text=True, check=False).stdout  # noqa: S603 - found on PATH
    parts = [platform.machine(), version, " ".join(sorted(flags)), " ".join(command)]
    parts += [path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir()) if path.suffix in {".h", ".cpp"}]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
