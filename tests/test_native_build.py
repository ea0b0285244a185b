"""Building the native step: once, whole or not at all, and with a clear word where it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.errors import UnsupportedDeviceError
from runtime.kernels import native_build
from runtime.kernels.native_build import NEEDED, SOURCES, VectorKind, build, vector_kinds

pytestmark = pytest.mark.skipif(not vector_kinds(), reason="the CPU has neither AVX-512 BF16 and VNNI nor AVX2")


def compiler(folder: Path, body: str) -> str:
    """A program on its own that behaves as told."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_a_library_is_built_once(native_library: Path, native_vectors: VectorKind) -> None:
    before = native_library.stat().st_mtime_ns
    assert build(native_library.parent, vectors=native_vectors) == native_library
    assert native_library.stat().st_mtime_ns == before


def test_another_compiler_makes_another_library(native_library: Path, tmp_path: Path) -> None:
    fake = compiler(tmp_path, 'while [ "$1" != "-o" ]; do shift || exit 0; [ $# = 0 ] && exit 0; done; echo x > "$2"')
    assert build(native_library.parent, compiler=fake) != native_library


def test_without_a_compiler_the_error_names_it(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedDeviceError, match="no-such-compiler"):
        build(tmp_path, compiler="no-such-compiler")


def test_a_failing_compiler_is_quoted_and_leaves_nothing(tmp_path: Path) -> None:
    fake = compiler(tmp_path, "echo step.cpp:1: something is wrong >&2; exit 1")
    with pytest.raises(UnsupportedDeviceError, match="something is wrong"):
        build(tmp_path / "native", compiler=fake)
    assert list((tmp_path / "native").iterdir()) == []


def test_the_sources_are_part_of_the_package() -> None:
    assert {"step.cpp", "simd.h"} <= {path.name for path in SOURCES.iterdir()}


def test_the_fastest_vectors_that_the_cpu_has_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, expected in (
        (NEEDED["avx512"] | NEEDED["avx2"], ["avx512", "avx2"]),
        (NEEDED["avx2"] | {"avx512f"}, ["avx2"]),
        (frozenset({"avx", "sse4_2"}), []),
    ):
        monkeypatch.setattr(native_build, "cpu_flags", lambda flags=flags: flags)
        assert vector_kinds() == expected


def test_vectors_that_the_cpu_lacks_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build, "cpu_flags", lambda: NEEDED["avx2"] - {"f16c"})
    with pytest.raises(UnsupportedDeviceError, match="lacks f16c"):
        build(tmp_path)
    with pytest.raises(UnsupportedDeviceError, match="lacks avx512_bf16, avx512_vnni"):
        build(tmp_path, vectors="avx512")
