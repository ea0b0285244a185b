"""Target `triton`: the mixture kernels in the sizes of a generation, compiled to cubin, verified under the interpreter.

It knows nothing of launching (`runtime.kernels.triton_launch` reads what is written here).
Read first: what is compiled follows from the base's widths and from the experts' ranks, not from their weights. The
kernels' source is run by Triton's interpreter against the loop reference before it is compiled; that the compiled code
does the same on a GPU is not verified here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from exporters.artefact import describe_file
from exporters.manifest import Check, Facts, FileEntry
from exporters.onnx_graph import Progress
from exporters.options import Source
from exporters.triton_compile import DTYPES, Compiled, check_arch, check_dtype, compile_variant
from exporters.triton_roofline import CARDS, estimate
from exporters.verify import SIZES, Tally, Wanted
from runtime.errors import ExportMismatchError, InvalidInputError
from runtime.kernels.mixture import mixture_loop, pack
from runtime.kernels.triton_interpreter import interpret
from runtime.kernels.triton_metadata import build_metadata
from runtime.kernels.triton_mixture import (
    Launch,
    Launcher,
    Variant,
    add_mixture_triton,
    decode_expand_variant,
    decode_shrink_variant,
    expert_rows,
    grouped_expand_variant,
    grouped_shrink_variant,
    rank_bucket,
)
from runtime.model.expert import linear_widths
from runtime.model.manifest import BaseRef, Manifest, Target

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""For float32 what summing in another order may change; else one unit in the last place, since the interpreter cuts
bfloat16 off where a GPU rounds."""

_NUM_EXPERTS = 6
_NUM_COLUMNS = 2


@dataclass(frozen=True)
class Linear:
    """A shape that mixtures have: experts of these ranks from `width` inputs to `out_width` outputs."""

    width: int
    out_width: int
    ranks: tuple[int, ...]

    def variants(self, dtype: torch.dtype) -> Iterator[Variant]:
        """All kernels that a mixture of this shape may launch."""
        for bucket in sorted({rank_bucket(rank) for rank in self.ranks}):
            yield grouped_shrink_variant(self.width, bucket, dtype)
        yield grouped_expand_variant(self.out_width, dtype)
        yield decode_shrink_variant(self.width, dtype)
        yield decode_expand_variant(self.out_width, dtype)


def linears(manifest: Manifest) -> tuple[Linear, ...]:
    """The shapes of a generation: base width to FFN width (gate, up) and back (down).

    Raises:
        InvalidInputError: it holds no expert.
    """
    ranks: dict[tuple[int, int], set[int]] = {}
    for unit in (unit for expert_set in manifest.experts for unit in expert_set.units):
        for target, rank in unit.ranks.items():
            ranks.setdefault(_widths(manifest.base, target), set()).add(rank)
    if not ranks:
        raise InvalidInputError("generation", manifest.generation, "it holds no expert whose mixture could be compiled")
    return tuple(Linear(*widths, tuple(sorted(found))) for widths, found in sorted(ranks.items()))


def write_kernels(source: Source, folder: Path, on_progress: Progress) -> tuple[FileEntry, ...]:
    """Write `<kernel>-<arch>-<shape>.cubin` for every kernel and architecture into `folder`.

    Raises:
        InvalidInputError: unknown architecture or dtype, or no experts.
        ExportMismatchError: a kernel does not compute what the loop computes, or does not compile as described.
    """
    options = source.options
    architectures = tuple(CARDS) if options.arch is None else (options.arch,)
    for arch in architectures:
        check_arch(arch)
    dtypes = [check_dtype(name) for name in (DTYPES if options.dtype is None else (options.dtype,))]
    shapes = linears(source.generation.manifest)
    rank = max(rank for shape in shapes for rank in shape.ranks)
    checks: dict[object, list[Check]] = {}
    for shape, dtype in itertools.product(shapes, dtypes):
        on_progress(f"{shape.width} to {shape.out_width}, {dtype}: verifying in Triton's interpreter")
        for key, check in verify_linear(shape, dtype).items():
            checks.setdefault(key, []).append(check)
    entries = []
    variants = [variant for dtype in dtypes for variant in distinct_variants(shapes, dtype)]
    for variant, arch in itertools.product(variants, architectures):
        path = folder / f"{variant.kernel}-{arch}-{shape_name(variant)}.cubin"
        on_progress(f"{path.name}: compiling")
        made = compile_variant(variant, arch)
        path.write_bytes(made.cubin)
        entries.append(describe_file(path, facts=_facts(variant, made, rank), checks=checks[variant.key]))
    return tuple(entries)


def distinct_variants(shapes: Iterable[Linear], dtype: torch.dtype) -> tuple[Variant, ...]:
    """All variants of some shapes, each once."""
    return tuple({variant.key: variant for shape in shapes for variant in shape.variants(dtype)}.values())


def shape_name(variant: Variant) -> str:
    """What tells the variants of a kernel apart: `w576-bfloat16`, and of a grouped shrink also its rank bucket."""
    dtype = str(variant.dtype).removeprefix("torch.")
    bucket = f"-r{variant.constants['BLOCK_R']}" if variant.kernel == "grouped_shrink" else ""
    return f"w{variant.constants['WIDTH']}{bucket}-{dtype}"


def verify_linear(shape: Linear, dtype: torch.dtype, launch: Launcher = interpret) -> dict[object, Check]:
    """Run random mixtures of a shape, with 1 to 64 tokens, against `mixture_loop`.

    Args:
        shape: every one of its ranks occurs.
        dtype: of experts and tokens.
        launch: runs the kernels.

    Returns:
        for the key of every variant of the shape, the check of the runs that it took part in.

    Raises:
        ExportMismatchError: an output differs, or a variant took no part.
    """
    generator = torch.Generator().manual_seed(0)
    ranks = [shape.ranks[e % len(shape.ranks)] for e in range(max(_NUM_EXPERTS, len(shape.ranks)))]
    a = [(torch.randn(rank, shape.width, generator=generator) / shape.width**0.5).to(dtype) for rank in ranks]
    b = [(torch.randn(shape.out_width, rank, generator=generator) / rank**0.5).to(dtype) for rank in ranks]
    scales = [2.0 ** (e % 3) for e in range(len(ranks))]
    experts = expert_rows(pack(a, b, scales, dtype=dtype, device=torch.device("cpu")), ranks)
    tallies: dict[object, Tally] = {}
    for size in SIZES:
        x = torch.randn(size, shape.width, generator=generator).to(dtype)
        before = torch.randn(size, shape.out_width, generator=generator).to(dtype)
        weights = _routing(size, len(ranks), generator)
        values, ids = weights.topk(_NUM_COLUMNS, dim=1)
        y, used = before.clone(), set[object]()

        def run(step: Launch, used: set[object] = used) -> None:
            used.add(step.variant.key)
            launch(step)

        add_mixture_triton(y, x, experts, build_metadata(ids, values, len(ranks)), run)
        wanted = Wanted(before.float() + mixture_loop(x, a, b, scales, weights), tolerance=TOLERANCES[dtype])
        for key in used:
            tally = tallies.setdefault(key, Tally("y"))
            tally.compare(f"mixture {shape.width} to {shape.out_width}, {dtype}", y.float().numpy(), wanted, size)
    for variant in shape.variants(dtype):
        if variant.key not in tallies:
            raise ExportMismatchError(f"{variant.kernel}-{shape_name(variant)}: no run needed it")
    return {key: tally.check() for key, tally in tallies.items()}


def _routing(size: int, num_experts: int, generator: torch.Generator) -> torch.Tensor:
    """Weights [T, E]: two experts per token, popular ones more often; every fifth token has one, every seventh none."""
    popularity = 1 / torch.arange(1, num_experts + 1)
    picks = torch.multinomial(popularity.expand(size, -1), _NUM_COLUMNS, generator=generator)
    weights = torch.zeros(size, num_experts).scatter(1, picks, torch.rand(picks.shape, generator=generator) + 0.1)
    weights[4::5] = weights[4::5] * (weights[4::5] == weights[4::5].max(1, keepdim=True).values)
    weights[6::7] = 0
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-6)


def _widths(base: BaseRef, target: Target) -> tuple[int, int]:
    return linear_widths(target, base)


def _facts(variant: Variant, made: Compiled, rank: int) -> Facts:
    rank = int(variant.constants["BLOCK_R"]) if variant.kernel == "grouped_shrink" else rank
    floor = estimate(variant, rank, CARDS[made.arch])
    return {
        "kernel": variant.kernel,
        "arch": made.arch,
        "dtype": str(variant.dtype).removeprefix("torch."),
        "constants": dict(variant.constants),
        "parameters": [{"name": name, "type": kind} for name, kind in made.parameters.items()],
        "aligned": list(made.aligned),
        "num_warps": made.num_warps,
        "shared_bytes": made.shared_bytes,
        "registers": made.registers,
        "spill_bytes": made.spill_bytes,
        "roofline_us": round(floor.least_us, 4),
        "triton": triton.__version__,
    }
