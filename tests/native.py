"""A pytest plugin: the native step, built once per session and kind of vectors; tests are skipped where it cannot run.

It does not know what is tested.
Read first: the skip says what the machine lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from runtime.engine.llama import LlamaModel
from runtime.engine.native_llama import NativeLlama
from runtime.errors import UnsupportedDeviceError
from runtime.kernels.native_build import VectorKind, build, vector_kinds
from runtime.kernels.native_step import NativeStep, StepShape
from runtime.kernels.step_kinds import WeightKind

NativeClass = Callable[[WeightKind], Callable[..., LlamaModel]]


def native_step(library: Path, shape: StepShape, *, weights: WeightKind, threads: int) -> NativeStep:
    """A step of random layers; its head and last norm are not set."""
    generator = torch.Generator().manual_seed(0)
    made = NativeStep(library, shape, weights=weights, threads=threads)
    heads, kv = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    matrices = {
        "qkv": (heads + 2 * kv, shape.width),
        "out": (shape.width, heads),
        "gate_up": (2 * shape.ffn, shape.width),
        "down": (shape.width, shape.ffn),
    }
    for layer in range(shape.layers):
        for name, size in matrices.items():
            made.set(name, layer, torch.randn(size, generator=generator) * 0.2)
        for name in ("attention_norm", "ffn_norm"):
            made.set(name, layer, torch.ones(shape.width))
    for name in ("cos", "sin"):
        made.set(name, 0, torch.rand(shape.context * shape.head_width, generator=generator))
    return made


def built(folder: Path, vectors: VectorKind) -> Path:
    """The library; whoever asks where it cannot be built is skipped."""
    try:
        return build(folder, vectors=vectors)
    except UnsupportedDeviceError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=vector_kinds() or ["avx2"])
def native_vectors(request: pytest.FixtureRequest) -> VectorKind:
    kind: VectorKind = request.param
    return kind


@pytest.fixture(scope="session")
def native_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native")


@pytest.fixture(scope="session")
def native_library(native_folder: Path, native_vectors: VectorKind) -> Path:
    return built(native_folder, native_vectors)


@pytest.fixture
def native_class(native_library: Path) -> NativeClass:
    """weights -> what makes a model of a Hugging Face model: `native_class("int8")(model, max_context=256)`."""

    def of(weights: WeightKind, threads: int = 2) -> Callable[..., LlamaModel]:
        return partial(NativeLlama, library=native_library, weights=weights, threads=threads)

    return of
