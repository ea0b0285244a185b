"""The flags of every command that runs an engine, and what they become.

It knows nothing of engines: `greenroom.cli.build_engine` makes one of these flags.
Read first: sizes are typed as people say them ("64MiB", "1.5GB", "1000000") and kept in bytes; defaults of limits are
those of `runtime.engine.options`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from runtime.engine.options import EngineOptions, Policy
from runtime.errors import InvalidInputError
from runtime.kernels.step_kinds import DeviceKind, GraphKind, StepKind, WeightKind
from runtime.memory.eviction import EvictionName

RepertoireFlag = Annotated[Path, typer.Option("--repertoire", help="Folder of the repertoire.")]
TrustFlag = Annotated[
    Path | None,
    typer.Option("--trust", help="Public key in PEM, or folder of *.pem: serve only what one of them signed."),
]
BaseFlag = Annotated[
    str | None,
    typer.Option("--base", help="Known name or folder of the base model. By default: what the repertoire names."),
]
ExpertMemoryFlag = Annotated[str, typer.Option("--expert-memory", help="Bytes of experts in memory, as in 64MiB.")]
DeviceMemoryFlag = Annotated[
    str, typer.Option("--device-memory", help="Bytes of experts on a GPU, as in 1GiB; on a CPU it counts for nothing.")
]
MaxRankFlag = Annotated[int, typer.Option("--max-rank", min=1, help="Experts of a higher rank are refused.")]
LoadersFlag = Annotated[
    int, typer.Option("--loaders", min=1, help="Threads that read experts; more where storage is slow to begin.")
]
TenantFloorsFlag = Annotated[
    str, typer.Option("--tenant-floors", help="Bytes that others leave a tenant's experts, as in gold=64MiB,tin=8MiB.")
]
PrefixMemoryFlag = Annotated[
    str, typer.Option("--prefix-memory", help="Bytes kept of earlier prompts' beginnings; 0B keeps none.")
]
KvMemoryFlag = Annotated[str, typer.Option("--kv-memory", help="Bytes of KV cache, as in 1GiB.")]
MaxRunningFlag = Annotated[int, typer.Option("--max-running", min=1, help="Sequences in the running batch at most.")]
DtypeFlag = Annotated[WeightKind, typer.Option("--dtype", help="What the weights of the base model are kept in.")]
StepFlag = Annotated[
    StepKind, typer.Option("--step", help="Who computes: our native step, torch, or the native one where it runs.")
]
DeviceFlag = Annotated[
    DeviceKind, typer.Option("--device", help="Where the model runs: the first CUDA device, the CPU, or what there is.")
]
GraphsFlag = Annotated[
    GraphKind, typer.Option("--cuda-graphs", help="Record decode steps on a CUDA device and replay them, or do not.")
]
ThreadsFlag = Annotated[int, typer.Option("--threads", min=0, help="Threads to compute with; 0 lets torch choose.")]
PolicyFlag = Annotated[
    Policy, typer.Option("--policy", help="Who goes first: by arrival, with the most experts in memory, or by task.")
]
EvictionFlag = Annotated[
    EvictionName, typer.Option("--eviction", help="What goes first: used longest ago, or of least use per byte.")
]
PrefetchFlag = Annotated[
    bool, typer.Option("--prefetch/--no-prefetch", help="Guess a prompt's task on arrival and begin to read.")
]
DraftFlag = Annotated[
    int,
    typer.Option("--max-draft", min=0, help="Tokens tried ahead where a greedy answer repeats itself; 0: none."),
]

LIMITS = EngineOptions()
DEFAULT_EXPERT_MEMORY = f"{LIMITS.expert_budget_bytes >> 20}MiB"
DEFAULT_DEVICE_MEMORY = f"{LIMITS.device_budget_bytes >> 20}MiB"
DEFAULT_TENANT_FLOORS = ""
DEFAULT_KV_MEMORY = f"{LIMITS.kv_budget_bytes >> 20}MiB"
DEFAULT_PREFIX_MEMORY = f"{LIMITS.prefix_budget_bytes >> 20}MiB"
DEFAULT_DTYPE: WeightKind = "float32"
DEFAULT_STEP: StepKind = "auto"
DEFAULT_DEVICE: DeviceKind = "auto"
DEFAULT_GRAPHS: GraphKind = "auto"
DEFAULT_THREADS = 0

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B|)", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True, kw_only=True)
class EngineFlags:
    """What an engine is built from.

    Args:
        repertoire: folder.
        trust: public key or folder of them; None serves unsigned generations too.
        base: known name or folder of the base model; None takes what the repertoire names.
        dtype: what the weights of the base model are kept in.
        step: who computes; see `runtime.kernels.step_kinds`.
        device: where; likewise.
        cuda_graphs: whether decode steps are recorded there; likewise.
        threads: to compute with; 0 lets torch choose.
        limits: budgets and bounds.
    """

    repertoire: Path
    trust: Path | None
    base: str | None
    dtype: WeightKind
    step: StepKind
    device: DeviceKind
    cuda_graphs: GraphKind
    threads: int
    limits: EngineOptions


def collect(
    *,
    repertoire: Path,
    trust: Path | None,
    base: str | None,
    dtype: WeightKind,
    step: StepKind,
    device: DeviceKind,
    cuda_graphs: GraphKind,
    threads: int,
    expert_memory: str,
    device_memory: str,
    tenant_floors: str,
    max_rank: int,
    loaders: int,
    kv_memory: str,
    prefix_memory: str,
    max_running: int,
    policy: Policy,
    eviction: EvictionName,
    prefetch: bool,
    max_draft: int,
) -> EngineFlags:
    """The flags of a command as one value; each is named as on the command line.

    Raises:
        InvalidInputError: a size or limit that cannot be used.
    """
    limits = EngineOptions(
        expert_budget_bytes=parse_size("expert_memory", expert_memory),
        device_budget_bytes=parse_size("device_memory", device_memory),
        tenant_floors=parse_sizes("tenant_floors", tenant_floors),
        max_rank=max_rank,
        num_loaders=loaders,
        kv_budget_bytes=parse_size("kv_memory", kv_memory),
        prefix_budget_bytes=parse_size("prefix_memory", prefix_memory, least=0),
        max_running=max_running,
        policy=policy,
        eviction=eviction,
        prefetch=prefetch,
        max_draft=max_draft,
    )
    return EngineFlags(
        repertoire=repertoire,
        trust=trust,
        base=base,
        dtype=dtype,
        step=step,
        device=device,
        cuda_graphs=cuda_graphs,
        threads=threads,
        limits=limits,
    )


def parse_sizes(field: str, text: str) -> dict[str, int]:
    """Bytes by name of "gold=64MiB,tin=8MiB"; none of "".

    Raises:
        InvalidInputError: anything else, or a name that stands there twice; carries `field`.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, found, size = (piece.strip() for piece in part.partition("="))
        if not (name and found) or name in sizes:
            raise InvalidInputError(field, text, "is NAME=SIZE,NAME=SIZE, each name once")
        sizes[name] = parse_size(field, size)
    return sizes


def parse_size(field: str, text: str, *, least: int = 1) -> int:
    """Bytes of "64MiB", "1.5GB" or "1000"; "iB" counts in powers of 1024, "B" in powers of 1000; case is free.

    Raises:
        InvalidInputError: anything else, or fewer than `least` bytes; carries `field`.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidInputError(field, text, "a size is a number and B, KB, MB, GB, TB, KiB, MiB, GiB or TiB")
    unit = match[2].lower()
    base = 1024 if "i" in unit else 1000
    num_bytes = int(float(match[1]) * base ** _POWERS[unit.rstrip("ib")])
    if num_bytes < least:
        raise InvalidInputError(field, text, "must be at least one byte")
    return num_bytes
