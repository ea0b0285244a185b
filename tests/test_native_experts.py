"""Experts in the native step: wherever they lie, of whatever rank and type, and however many tokens use others.

It does not know engines; the step is called as `runtime.engine.native_llama` calls it.
Read first: what a token gets must be the same bit for bit, so whole tensors are compared exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from native import native_step

from runtime.kernels.native_mixture import NativeColumn, NativeMixture, NativePart, NativeStage
from runtime.kernels.native_step import NativeStep, StepShape

SHAPE = StepShape(
    layers=2, width=64, ffn=128, heads=4, kv_heads=2, head_width=16, vocabulary=32, context=16, epsilon=1e-5
)
LINEARS = {"q": (64, 64), "k": (64, 32), "v": (64, 32), "o": (64, 64), "gate": (64, 128), "up": (64, 128)}
LINEARS["down"] = (128, 64)
SLOTS = 40


@pytest.fixture(params=["float32", "int8"])
def step(native_library: Path, request: pytest.FixtureRequest) -> Iterator[NativeStep]:
    made = native_step(native_library, SHAPE, weights=request.param, threads=2)
    yield made
    made.close()


def moved(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """The same numbers, so many elements behind the beginning of a line of the cache."""
    room = torch.empty(tensor.numel() + 64 + elements, dtype=tensor.dtype)
    begin = next(i for i in count() if (room.data_ptr() + i * tensor.itemsize) % 64 == 0) + elements
    place = room[begin : begin + tensor.numel()].view(tensor.shape)
    return place.copy_(tensor)


def mixture(
    seed: int, *, rank: int = 8, dtype: torch.dtype = torch.bfloat16, experts: int = 1, at: int = 0
) -> NativeMixture:
    """Experts on all linears of both layers; with several, the two best of each token."""
    generator, made = torch.Generator().manual_seed(seed), NativeMixture(SHAPE.layers)

    def some(*shape: int) -> torch.Tensor:
        return moved(torch.randn(*shape, generator=generator).mul_(0.3).to(dtype), at)

    for layer in range(SHAPE.layers):
        columns = [
            NativeColumn.of_tensors(
                {name: (some(rank, wide), some(rank, narrow)) for name, (wide, narrow) in LINEARS.items()}, 0.5
            )
            for _ in range(experts)
        ]
        made.set_layer(layer, [NativePart("top_k", 2, torch.randn(experts, 64, generator=generator))], columns)
    return made


def answers(step: NativeStep, mixtures: list[NativeMixture], rows: list[int]) -> torch.Tensor:
    """What the step makes of one token per row, each in a slot of its own; row 0 is the base alone."""
    hidden = torch.randn(SLOTS, 64, generator=torch.Generator().manual_seed(1))[: len(rows)].clone()
    cache = torch.zeros(SHAPE.layers, SLOTS, SHAPE.kv_heads, SHAPE.context, SHAPE.head_width)
    step.set_cache(cache, cache.clone())
    places = [torch.tensor(each, dtype=torch.int32) for each in ([3] * len(rows), range(len(rows)), rows)]
    stage = NativeStage([None, *mixtures])
    step.run_layers(hidden, range(SHAPE.layers), *places[:2], stage=stage, rows=places[2], alone=True)
    return hidden


@pytest.mark.parametrize("elements", [1, 8, 31])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_expert_gives_the_same_wherever_it_begins_in_memory(
    step: NativeStep, dtype: torch.dtype, elements: int
) -> None:
    rows = [1, 1, 0, 1]
    expected = answers(step, [mixture(5, dtype=dtype)], rows)
    assert torch.equal(answers(step, [mixture(5, dtype=dtype, at=elements)], rows), expected)
    assert not torch.equal(answers(step, [mixture(6, dtype=dtype)], rows), expected)


@pytest.mark.parametrize("tokens", [2, 8, 9, 16, 33, 40])
def test_a_token_gets_the_same_whatever_experts_the_others_use(step: NativeStep, tokens: int) -> None:
    kinds = [
        mixture(1),
        mixture(2, rank=3),
        mixture(3, rank=17, dtype=torch.float32),
        mixture(4, rank=1, experts=5),
        mixture(5, rank=5, experts=3),
    ]
    rows = [(i * i + i // 7) % (len(kinds) + 1) for i in range(tokens)]
    together = answers(step, kinds, rows)
    for row in set(rows):
        alone = answers(step, kinds, [row] * tokens)
        mine = [token for token in range(tokens) if rows[token] == row]
        assert torch.equal(together[mine], alone[mine])


def test_sequences_of_one_expert_each_get_what_its_matrices_say(native_library: Path) -> None:
    """The base's matrices are zero, so what is left are the updates of gate, up and down."""
    step = NativeStep(native_library, SHAPE, weights="float32", threads=1)
    for layer in range(SHAPE.layers):
        for name, (rows, cols) in {"qkv": (128, 64), "out": (64, 64), "gate_up": (256, 64), "down": (64, 128)}.items():
            step.set(name, layer, torch.zeros(rows, cols))
        for name in ("attention_norm", "ffn_norm"):
            step.set(name, layer, torch.ones(64))
    for name in ("cos", "sin"):
        step.set(name, 0, torch.zeros(16 * 16))
    generator, made = torch.Generator().manual_seed(3), NativeMixture(SHAPE.layers)
    matrices = []
    for layer in range(SHAPE.layers):
        gate, up, down = (
            (
                torch.randn(4, LINEARS[name][0], generator=generator),
                torch.randn(4, LINEARS[name][1], generator=generator),
            )
            for name in ("gate", "up", "down")
        )
        matrices.append((gate, up, down))
        column = NativeColumn.of_tensors({"gate": gate, "up": up, "down": down}, 0.5)
        made.set_layer(layer, [NativePart("top_k", 1, torch.zeros(1, 64))], [column])
    hidden = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    expected = hidden.clone()
    for each in matrices:
        x = expected / (expected.square().mean() + SHAPE.epsilon).sqrt()
        gate, up = (0.5 * (x @ a.t()) @ b for a, b in each[:2])
        a, b = each[2]
        expected = expected + 0.5 * ((torch.nn.functional.silu(gate) * up) @ a.t()) @ b
    got = answers(step, [made], [1])
    step.close()
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
