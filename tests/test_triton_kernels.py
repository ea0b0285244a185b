"""The Triton kernels under Triton's interpreter against the loop, on all routing patterns, ranks, dtypes and sizes.

It does not know whether a GPU computes the same; the interpreter runs the source that is compiled.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton exists for Linux on x86-64 alone")

from exporters.triton_artefact import Linear, verify_linear
from runtime.errors import ExportMismatchError, InvalidInputError
from runtime.kernels import triton_kernels
from runtime.kernels.mixture import PackedUpdate, mixture_loop, pack
from runtime.kernels.triton_interpreter import interpret
from runtime.kernels.triton_metadata import MixtureMetadata, build_metadata
from runtime.kernels.triton_mixture import ExpertRows, Launch, Launcher, add_mixture_triton, expert_rows

E, D, H = 6, 40, 72
CPU = torch.device("cpu")
SCALES = [2.0, 0.5, 1.0, 4.0, 1.0, 0.25]
PATTERNS = ("identical", "distinct", "uniform", "skewed", "zipf")
RANKS = {"8": (8,) * E, "16": (16,) * E, "32": (32,) * E, "64": (64,) * E, "mixed": (8, 16, 32, 64, 5, 1)}
# The interpreter cuts bfloat16 off where a GPU rounds; relative to the largest output.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def routed(pattern: str, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Ids [T, 2] of two different experts per token, chosen as the pattern says."""
    if pattern == "identical":
        return torch.tensor([[1, 4]]).expand(num_tokens, -1)
    if pattern == "distinct":
        first = 2 * torch.arange(num_tokens) % E
        return torch.stack((first, first + 1), dim=1)
    popularity = {
        "uniform": torch.ones(E),
        "skewed": torch.tensor([100.0, 1, 1, 1, 1, 1]),
        "zipf": 1 / torch.arange(1, E + 1),
    }[pattern]
    return torch.multinomial(popularity.expand(num_tokens, -1), 2, generator=generator)


def dense(ids: torch.Tensor, weights: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[T, E] of ids and weights [T, K]; what is below 0 lands in a column that is cut off."""
    columns = torch.where(ids >= 0, ids, num_experts)
    return torch.zeros(len(ids), num_experts + 1).scatter_add(1, columns, weights.float())[:, :num_experts]


def random_experts(
    ranks: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, width: int = D, out_width: int = H
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    a = [torch.randn(rank, width, generator=generator).to(dtype) for rank in ranks]
    b = [torch.randn(out_width, rank, generator=generator).to(dtype) for rank in ranks]
    return a, b


def packed(
    a: list[torch.Tensor], b: list[torch.Tensor], scales: list[float], dtype: torch.dtype = torch.float32
) -> ExpertRows:
    return expert_rows(pack(a, b, scales, dtype=dtype, device=CPU), [len(rows) for rows in a])


def check(pattern: str, num_tokens: int, ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    a, b = random_experts(ranks, dtype, generator)
    x = torch.randn(num_tokens, D, generator=generator).to(dtype)
    y = torch.randn(num_tokens, H, generator=generator).to(dtype)
    ids, weights = routed(pattern, num_tokens, generator), torch.rand(num_tokens, 2, generator=generator) + 0.1
    expected = y.float() + mixture_loop(x, a, b, SCALES, dense(ids, weights, E))
    add_mixture_triton(y, x, packed(a, b, SCALES, dtype), build_metadata(ids, weights, E), interpret)
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=TOLERANCES[dtype] * float(expected.abs().max()))


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_many_tokens_equal_the_loop(pattern: str, ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    check(pattern, 64, ranks, dtype)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_few_tokens_equal_the_loop(pattern: str, num_tokens: int, dtype: torch.dtype) -> None:
    for ranks in RANKS.values() if dtype is torch.float32 else [RANKS["mixed"]]:
        check(pattern, num_tokens, ranks, dtype)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    num_tokens=st.integers(1, 40),
    num_columns=st.integers(1, 3),
    ranks=st.lists(st.integers(0, 70), min_size=1, max_size=7),
    widths=st.tuples(st.integers(1, 70), st.integers(1, 140)),
    popular=st.integers(0, 7),
)
@example(seed=0, num_tokens=33, num_columns=1, ranks=[3], widths=(1, 1), popular=1)
@example(seed=0, num_tokens=33, num_columns=2, ranks=[0, 0], widths=(16, 16), popular=2)
@example(seed=0, num_tokens=40, num_columns=2, ranks=[64, 1, 65], widths=(64, 128), popular=0)
@example(seed=0, num_tokens=17, num_columns=2, ranks=[4, 8], widths=(2100, 8), popular=2)
@example(seed=0, num_tokens=2, num_columns=2, ranks=[4, 8], widths=(2100, 8), popular=2)
def test_any_sizes_equal_the_loop(
    *, seed: int, num_tokens: int, num_columns: int, ranks: list[int], widths: tuple[int, int], popular: int
) -> None:
    """Experts that nobody uses or that have no rank, tokens without experts, repeated experts, ragged ends."""
    generator = torch.Generator().manual_seed(seed)
    num_experts = len(ranks)
    a, b = random_experts(tuple(ranks), torch.float32, generator, *widths)
    x = torch.randn(num_tokens, widths[0], generator=generator)
    y = torch.randn(num_tokens, widths[1], generator=generator)
    ids = torch.randint(-1, min(popular, num_experts), (num_tokens, num_columns), generator=generator)
    weights = torch.rand(num_tokens, num_columns, generator=generator).round(decimals=1)
    scales = [1.0] * num_experts
    expected = y + mixture_loop(x, a, b, scales, dense(ids, weights, num_experts))
    add_mixture_triton(y, x, packed(a, b, scales), build_metadata(ids, weights, num_experts), interpret)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


def setting(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, ExpertRows, MixtureMetadata]:
    generator = torch.Generator().manual_seed(num_tokens)
    a, b = random_experts(RANKS["mixed"], torch.float32, generator)
    x, y = torch.randn(num_tokens, D, generator=generator), torch.randn(num_tokens, H, generator=generator)
    ids, weights = routed("zipf", num_tokens, generator), torch.rand(num_tokens, 2, generator=generator)
    return y, x, packed(a, b, SCALES), build_metadata(ids, weights, E)


def poisoned(launch: Launch, *, kernels: ModuleType = triton_kernels) -> None:
    """Interpret a launch; before the first shrink the intermediate is filled with NaN."""
    mid = launch.arguments["mid"]
    assert isinstance(mid, torch.Tensor)
    is_first = launch.variant.kernel == "decode_shrink" or launch.variant.constants["BLOCK_R"] == 8
    if launch.variant.kernel.endswith("shrink") and is_first:
        mid.fill_(torch.nan)
    interpret(launch, kernels=kernels)


@pytest.mark.parametrize("num_tokens", [7, 64])
def test_no_kernel_reads_a_place_of_the_intermediate_that_none_wrote(num_tokens: int) -> None:
    y, *rest = setting(num_tokens)
    add_mixture_triton(y, *rest, poisoned)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("num_tokens", [7, 64])
def test_a_column_slice_is_changed_in_place_and_nothing_beside_it(num_tokens: int) -> None:
    y, x, experts, metadata = setting(num_tokens)
    wide = torch.full((num_tokens, H + 20), 7.0)
    wide[:, 10 : 10 + H] = y
    add_mixture_triton(y, x, experts, metadata, interpret)
    add_mixture_triton(wide[:, 10 : 10 + H], x, experts, metadata, interpret)
    assert torch.equal(wide[:, 10 : 10 + H], y)
    assert (wide[:, :10] == 7).all()
    assert (wide[:, 10 + H :] == 7).all()


def test_a_tokens_result_does_not_depend_on_the_other_tokens_of_its_batch() -> None:
    y, x, experts, metadata = setting(64)
    mine = build_metadata(metadata.ids[:20], metadata.weights[:20], E)
    add_mixture_triton(alone := y[:20].clone(), x[:20], experts, mine, interpret)
    x[20:] *= 1e20  # what leaks into another token would drown it
    add_mixture_triton(y, x, experts, metadata, interpret)
    torch.testing.assert_close(y[:20], alone, rtol=1e-5, atol=1e-5)


def test_a_small_rank_is_not_padded_to_a_large_one() -> None:
    launches: list[Launch] = []
    add_mixture_triton(*setting(64), launches.append)
    shrinks = [launch for launch in launches if launch.variant.kernel == "grouped_shrink"]
    assert [launch.variant.constants["BLOCK_R"] for launch in shrinks] == [8, 16, 32, 64]
    bounds = [(launch.arguments["above_rank"], launch.arguments["up_to_rank"]) for launch in shrinks]
    assert bounds == [(0, 8), (15, 16), (31, 32), (63, 64)]
    assert [launch.variant.kernel for launch in launches[4:]] == ["grouped_expand"]


def test_nothing_is_launched_where_nothing_can_be_added() -> None:
    launches: list[Launch] = []
    a, b = random_experts((0, 0), torch.float32, torch.Generator())
    nobody = build_metadata(torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, 0), 2)
    add_mixture_triton(torch.zeros(3, H), torch.zeros(3, D), packed(a, b, [1.0, 1.0]), nobody, launches.append)
    somebody = build_metadata(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), 2)
    add_mixture_triton(torch.zeros(3, H), torch.zeros(3, D), packed(a, b, [1.0, 1.0]), somebody, launches.append)
    assert launches == []


def test_what_does_not_fit_is_named() -> None:
    y, x, experts, metadata = setting(7)

    def refused(message: str, *arguments: object) -> None:
        with pytest.raises(InvalidInputError, match=message):
            add_mixture_triton(*arguments, interpret)  # type: ignore[arg-type]

    refused("shapes=.* do not fit each other", y[:6], x, experts, metadata)
    refused("shapes=.* do not fit each other", y, x[:, 1:], experts, metadata)
    refused(r"y=torch.float16: must be torch.float32", y.half(), x, experts, metadata)
    refused(
        "x=torch.float32: must be torch.float32, elements of a row beside", y, x.t().contiguous().t(), experts, metadata
    )
    refused("the routing is over 9 experts", y, x, experts, build_metadata(metadata.ids, metadata.weights, 9))
    with pytest.raises(InvalidInputError, match=r"ranks=\(8, 8\): must add up to the 126 packed rows"):
        expert_rows(experts.update, (8, 8))


def test_what_32_bits_cannot_count_is_refused() -> None:
    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device="meta")

    experts = expert_rows(PackedUpdate(meta(64, 4096), meta(64, 4096), meta(64)), (64,))
    for num_tokens, num_columns, field in ((2**19, 1, "x"), (2**18, 200, "intermediate")):
        ids = torch.empty(num_tokens, num_columns, dtype=torch.int32, device="meta")
        y, x, metadata = meta(num_tokens, 4096), meta(num_tokens, 4096), MixtureMetadata(ids, meta(1), 1, None)
        with pytest.raises(InvalidInputError, match=rf"{field}=\(.*has 2\^31 elements or more"):
            add_mixture_triton(y, x, experts, metadata, interpret)


# ---- a wrong kernel is found out

RANKS_OF_SHAPES = (5, 8, 70)
SHAPE = Linear(520, 140, RANKS_OF_SHAPES)
WIDE = Linear(2100, 8, RANKS_OF_SHAPES)  # so wide that a grouped shrink splits it
MUTATIONS = [
    ("grouped_shrink", "total * weight[:, None]", "total"),
    ("grouped_shrink", "pair // num_columns", "pair // num_columns * 0"),
    ("grouped_shrink", "tl.load(tiles + 3 * tile + 2)", "tl.load(tiles + 3 * tile + 2) - 1"),
    ("grouped_shrink", "first_rank = tl.program_id(1) * BLOCK_R", "first_rank = 0"),
    ("grouped_shrink", "rank <= above_rank", "rank <= above_rank + 1"),
    ("grouped_shrink", "(first_row + r)", "r"),
    ("grouped_expand", "== expert)", ">= 0)"),
    ("grouped_expand", "for k in range(num_columns)", "for k in range(1)"),
    ("grouped_expand", "* max_tile_experts + j", "* max_tile_experts"),
    ("grouped_expand", "range(0, rank, BLOCK_R)", "range(0, BLOCK_R, BLOCK_R)"),
    ("grouped_expand", "before + total", "total"),
    ("grouped_expand", "tile * BLOCK_T +", ""),
    ("decode_shrink", "shrunk * tl.load(weights + pair)", "shrunk"),
    ("decode_shrink", "split * BLOCK_D +", ""),
    ("decode_shrink", "first_rank = tl.program_id(1) * BLOCK_R", "first_rank = 0"),
    ("decode_shrink", "(first_row + r)", "r"),
    ("decode_expand", "for split in range(num_splits)", "for split in range(1)"),
    ("decode_expand", "for k in range(num_columns)", "for k in range(1)"),
    ("decode_expand", "range(0, rank, BLOCK_R)", "range(0, BLOCK_R, BLOCK_R)"),
    ("decode_expand", "before + total", "total"),
]
SPLIT_MUTATIONS = [
    ("grouped_shrink", "split * SPAN + begin", "begin"),
    ("grouped_expand", "for split in range(num_splits)", "for split in range(1)"),
]


def mutated_kernels(folder: Path, kernel: str, old: str, new: str) -> ModuleType:
    """The kernels' module with one expression of one kernel changed."""
    assert triton_kernels.__file__
    source = Path(triton_kernels.__file__).read_text(encoding="utf-8")
    (text,) = (
        ast.get_source_segment(source, node)
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == kernel
    )
    assert text is not None
    docstring_end = text.index('"""', text.index('"""') + 3)
    head, body = text[:docstring_end], text[docstring_end:]
    assert body.count(old) == 1, f"{kernel}: {old}"
    path = folder / "mutated.py"
    path.write_text(source.replace(text, head + body.replace(old, new)), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mutated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mutant(tmp_path: Path, request: pytest.FixtureRequest) -> Launcher:
    return partial(poisoned, kernels=mutated_kernels(tmp_path, *request.param))


@pytest.mark.parametrize("mutant", MUTATIONS, ids=[f"{kernel}: {new}" for kernel, _, new in MUTATIONS], indirect=True)
def test_a_changed_kernel_fails_verification(mutant: Launcher) -> None:
    with pytest.raises(ExportMismatchError, match=r"mixture 520 to 140.*largest error"):
        verify_linear(SHAPE, torch.float32, mutant)


@pytest.mark.parametrize("mutant", SPLIT_MUTATIONS, ids=[new for _, _, new in SPLIT_MUTATIONS], indirect=True)
def test_a_kernel_that_splits_its_inputs_wrongly_fails_verification(mutant: Launcher) -> None:
    with pytest.raises(ExportMismatchError, match=r"mixture 2100 to 8.*largest error"):
        verify_linear(WIDE, torch.float32, mutant)


def test_the_kernels_as_they_are_pass_verification_in_every_dtype() -> None:
    for dtype in TOLERANCES:
        checks = verify_linear(SHAPE, dtype)
        assert set(checks) == {variant.key for variant in SHAPE.variants(dtype)}
        assert all(check.max_error <= check.tolerance for check in checks.values())
