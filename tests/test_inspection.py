"""Looking at bytes as they are read: the same digests as hashlib gives, whoever looks, and no number that is none."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from native import built, native_step

from runtime.kernels.inspection import Inspected, Inspector, NativeInspector, native_inspector
from runtime.kernels.native_build import vector_kinds
from runtime.kernels.native_step import NativeStep, StepShape

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (0, 4, 52, 56, 60, 64, 68, 116, 120, 128, 4096, 65532, 65536, 65600, 131072, 131200)
"""Around the ends of blocks and strides."""
SHAPE = StepShape(
    layers=2,
    width=64,
    ffn=128,
    heads=4,
    kv_heads=2,
    head_width=16,
    vocabulary=64,
    context=64,
    epsilon=1e-5,
)


@pytest.fixture(params=["python", *vector_kinds()])
def inspector(request: pytest.FixtureRequest, native_folder: Path) -> Inspector:
    if request.param == "python":
        return Inspector()
    return NativeInspector(built(native_folder, request.param))


def pieces_of(lengths: list[int], seed: int = 0) -> list[memoryview]:
    chance = random.Random(seed)
    return [memoryview(bytearray(chance.randbytes(length))) for length in lengths]


def digests(found: list[Inspected]) -> list[str]:
    return [each.sha256 for each in found]


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_any_length_have_the_digests_that_hashlib_gives(inspector: Inspector, seed: int) -> None:
    chance = random.Random(seed)
    pieces = pieces_of(chance.choices(LENGTHS, k=chance.randrange(8)), seed)
    found = inspector.look(pieces, torch.float32)
    assert digests(found) == [hashlib.sha256(piece).hexdigest() for piece in pieces]
    assert [each.data for each in found] == pieces


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_none_is_found_wherever_it_stands(
    inspector: Inspector, dtype: torch.dtype, value: float
) -> None:
    for place in (0, 31, 32, 40_000, 49_999):
        numbers = torch.full((50_000,), torch.finfo(dtype).max, dtype=dtype)  # the largest that is a number
        numbers[::2] *= -1
        good, bad = (memoryview(numbers.clone().view(torch.uint8).numpy()) for _ in range(2))
        torch.frombuffer(bad, dtype=dtype)[place] = value
        assert [each.finite for each in inspector.look([good, bad, good], dtype)] == [True, False, True]


@pytest.mark.parametrize("wait", [False, True])
def test_what_is_read_from_a_file_is_what_lies_there(inspector: Inspector, tmp_path: Path, wait: bool) -> None:
    text = random.Random(0).randbytes(700_000)
    path = tmp_path / "file"
    path.write_bytes(text)
    descriptor = os.open(path, os.O_RDONLY)
    lengths = [131_072, 4, 0, 200_000, 65_600]
    into = [memoryview(bytearray(length)) for length in lengths]
    found = inspector.read(descriptor, 1000, into, torch.bfloat16, wait=wait)
    begins = [1000 + sum(lengths[:i]) for i in range(5)]
    wanted = [text[begin : begin + length] for begin, length in zip(begins, lengths, strict=True)]
    assert [bytes(each.data) for each in found] == wanted
    assert digests(found) == [hashlib.sha256(each).hexdigest() for each in wanted]
    os.close(descriptor)


@pytest.mark.parametrize("wait", [False, True])
def test_a_file_that_ends_gives_the_pieces_before_its_end(inspector: Inspector, tmp_path: Path, wait: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    descriptor = os.open(path, os.O_RDONLY)
    into = [memoryview(bytearray(30_000)) for _ in range(5)]
    found = inspector.read(descriptor, 0, into, torch.float32, wait=wait)
    assert digests(found) == [hashlib.sha256(bytes(30_000)).hexdigest()] * 3
    os.close(descriptor)


def test_only_who_may_wait_is_told_that_a_disk_refuses(inspector: Inspector, tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)  # a folder
    into = [memoryview(bytearray(64))]
    assert inspector.read(descriptor, 0, into, torch.float32, wait=False) == []
    with pytest.raises(IsADirectoryError):
        inspector.read(descriptor, 0, into, torch.float32, wait=True)
    os.close(descriptor)


def test_a_library_that_hashes_wrongly_is_not_used(native_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        NativeInspector, "look", lambda self, pieces, dtype: [Inspected(p, "0" * 64, finite=True) for p in pieces]
    )
    assert type(native_inspector(native_library)) is Inspector


@pytest.fixture
def step(native_library: Path) -> Iterator[NativeStep]:
    """It uses every core, so that who computes beside it takes one away."""
    made = native_step(native_library, SHAPE, weights="float32", threads=len(os.sched_getaffinity(0)))
    yield made
    made.close()


def passed(step: NativeStep, num_tokens: int) -> torch.Tensor:
    """What layers make of a prompt's tokens without experts."""
    hidden = torch.randn(num_tokens, SHAPE.width, generator=torch.Generator().manual_seed(1))
    cache = torch.zeros(SHAPE.layers, 1, SHAPE.kv_heads, SHAPE.context, SHAPE.head_width)
    step.set_cache(cache, cache.clone())
    positions, slots = torch.arange(num_tokens, dtype=torch.int32), torch.zeros(num_tokens, dtype=torch.int32)
    step.run_layers(hidden, range(SHAPE.layers), positions, slots, stage=None, rows=None, alone=False)
    return hidden


@pytest.mark.parametrize("num_tokens", [8, 60], ids=["few", "many"])
def test_who_looks_and_computes_beside_a_step_gets_digests_and_the_step_computes_the_same(
    step: NativeStep, num_tokens: int
) -> None:
    pieces = pieces_of([120_000] * 7)
    wanted = [hashlib.sha256(piece).hexdigest() for piece in pieces]
    alone = passed(step, num_tokens)
    ended, turns, wrong = threading.Event(), list[int](), list[object]()

    def look() -> None:
        while not ended.is_set():
            found = digests(step.inspector.look(pieces, torch.float32))
            hashlib.sha256(pieces[0]).digest()
            turns.append(1)
            wrong.extend([found] if found != wanted else [])

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(1000):
        assert torch.equal(passed(step, num_tokens), alone)
    ended.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert len(turns) > 3
    assert wrong == []


def test_a_good_library_is_used_and_a_team_may_be_asked_to_look_at_nothing(
    native_library: Path, step: NativeStep
) -> None:
    assert isinstance(native_inspector(native_library), NativeInspector)
    assert step.inspector.look([], torch.float32) == []
    assert passed(step, 60).isfinite().all()


def test_looking_goes_on_without_the_team_when_the_step_is_closed(step: NativeStep) -> None:
    step.close()
    pieces = pieces_of([1000, 64])
    found = step.inspector.look(pieces, torch.float32)
    assert digests(found) == [hashlib.sha256(piece).hexdigest() for piece in pieces]
