"""A pytest plugin: the native step, built once per session; tests that ask for it are skipped where it cannot run.

It does not know what is tested.
Read first: the skip says what the machine lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from runtime.engine.llama import LlamaModel
from runtime.engine.native_llama import NativeLlama
from runtime.errors import UnsupportedDeviceError
from runtime.kernels.native_build import build
from runtime.kernels.step_kinds import WeightKind

NativeClass = Callable[[WeightKind], Callable[..., LlamaModel]]


@pytest.fixture(scope="session")
def native_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return build(tmp_path_factory.mktemp("native"))
    except UnsupportedDeviceError as error:
        pytest.skip(str(error))


@pytest.fixture
def native_class(native_library: Path) -> NativeClass:
    """weights -> what makes a model of a Hugging Face model: `native_class("int8")(model, max_context=256)`."""

    def of(weights: WeightKind, threads: int = 2) -> Callable[..., LlamaModel]:
        return partial(NativeLlama, library=native_library, weights=weights, threads=threads)

    return of
