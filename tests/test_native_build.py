"""Building the native step: once, whole or not at all, and with a clear word where it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.errors import UnsupportedDeviceError
from runtime.kernels.native_build import NEEDED, SOURCES, build, cpu_flags

pytestmark = pytest.mark.skipif(not cpu_flags().issuperset(NEEDED), reason="the CPU lacks AVX-512 BF16 or VNNI")


def compiler(folder: Path, body: str) -> str:
    """A program on its own that behaves as told."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_a_library_is_built_once(native_library: Path) -> None:
    before = native_library.stat().st_mtime_ns
    assert build(native_library.parent) == native_library
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
