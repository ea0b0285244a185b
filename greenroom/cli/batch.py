"""`greenroom batch`: answer the rows of a file offline.

It knows nothing of engines or rows (`runtime.batch`); it reads options, shows progress and says what happened.
Read first: rows that cannot be answered go to a side file and make the exit code 1; the others are answered all the
same. Started again after an interruption, the same command goes on where it stopped.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from greenroom.cli import engine_flags as flags
from greenroom.cli.ray_choice import RAY, RayChoice
from runtime.batch.rows import SHARD_ROWS
from runtime.engine.request import SamplingParams
from runtime.errors import InvalidInputError

if TYPE_CHECKING:
    from runtime.batch.progress import Progress

_DEFAULT = SamplingParams()


def batch(
    source: Annotated[
        str,
        typer.Argument(help="JSONL, CSV or Parquet with `input`, and optionally `task` and `max_tokens`; path or URL."),
    ],
    target: Annotated[str, typer.Argument(help="File to write; or a folder, named with a / at its end, for parts.")],
    *,
    repertoire: flags.RepertoireFlag,
    trust: flags.TrustFlag = None,
    base: flags.BaseFlag = None,
    generation: Annotated[
        int | None, typer.Option(min=1, help="Generation that answers. By default: the current one.")
    ] = None,
    source_format: Annotated[
        str | None, typer.Option("--from", help="jsonl, csv, parquet or openai. By default: what the name says.")
    ] = None,
    target_format: Annotated[
        str | None, typer.Option("--to", help="The same. By default: what the name says, or the source's.")
    ] = None,
    shard_rows: Annotated[
        int, typer.Option(min=1, help="Rows that are answered, kept and resumed as one.")
    ] = SHARD_ROWS,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew, whatever an interrupted run left.")] = False,
    max_tokens: Annotated[
        int, typer.Option(help="New tokens at most, where a row does not say.")
    ] = _DEFAULT.max_tokens,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = _DEFAULT.temperature,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the model's end token, for measurements.")
    ] = _DEFAULT.ignore_eos,
    seed: Annotated[int | None, typer.Option(help="Of sampling; each row adds its line. By default: 0.")] = None,
    expert_memory: flags.ExpertMemoryFlag = flags.DEFAULT_EXPERT_MEMORY,
    device_memory: flags.DeviceMemoryFlag = flags.DEFAULT_DEVICE_MEMORY,
    max_rank: flags.MaxRankFlag = flags.LIMITS.max_rank,
    loaders: flags.LoadersFlag = flags.LIMITS.num_loaders,
    kv_memory: flags.KvMemoryFlag = flags.DEFAULT_KV_MEMORY,
    max_running: flags.MaxRunningFlag = flags.LIMITS.max_running,
    policy: flags.PolicyFlag = flags.LIMITS.policy,
    eviction: flags.EvictionFlag = flags.LIMITS.eviction,
    dtype: flags.DtypeFlag = flags.DEFAULT_DTYPE,
    step: flags.StepFlag = flags.DEFAULT_STEP,
    device: flags.DeviceFlag = flags.DEFAULT_DEVICE,
    threads: flags.ThreadsFlag = flags.DEFAULT_THREADS,
    ray: Annotated[bool, typer.Option("--ray", help="Let workers on a Ray cluster do it.")] = False,
    ray_address: Annotated[
        str, typer.Option(help="local: a cluster on this machine alone; auto: the one it is part of; or HOST:PORT.")
    ] = RAY.address,
    ray_workers: Annotated[int, typer.Option(min=1, help="Workers, each with its own engine.")] = RAY.num_workers,
    ray_gpus: Annotated[float, typer.Option(min=0.0, help="GPUs of each worker.")] = RAY.num_gpus,
) -> None:
    """Answer every row of a file; the tasks are located first, then rows are answered task by task."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, ignore_eos=ignore_eos)
    chosen = flags.collect(
        repertoire=repertoire,
        trust=trust,
        base=base,
        dtype=dtype,
        step=step,
        device=device,
        cuda_graphs="off",  # neither must what ran before choose the sizes of a recorded step
        threads=threads,
        expert_memory=expert_memory,
        device_memory=device_memory,
        tenant_floors="",  # a file's rows are nobody's in particular
        max_rank=max_rank,
        loaders=loaders,
        kv_memory=kv_memory,
        prefix_memory="0B",  # what ran before must not change how a shard is computed
        max_running=max_running,
        policy=policy,
        eviction=eviction,
        prefetch=False,  # tasks are known before they are needed
        max_draft=flags.LIMITS.max_draft,
    )
    cluster = RayChoice(address=ray_address, num_workers=ray_workers, num_gpus=ray_gpus)
    if not ray and cluster != RAY:
        raise InvalidInputError("ray", ray, "is needed by the other --ray flags")
    from greenroom.cli.batch_job import check_places, make_job, opened, worked
    from runtime.batch.run import run_batch

    places = check_places(source, target, source_format=source_format, target_format=target_format)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with opened(chosen, generation) as found:
        job = make_job(places, chosen, found, sampling=sampling, shard_rows=shard_rows, fresh=fresh)
        with (
            worked(chosen, job, cluster if ray else None, on_wait=console.status) as workers,
            shown(console) as on_progress,
        ):
            report = run_batch(job, workers, on_progress=on_progress)
    console.print(
        f"{report.answered} of {report.rows} rows answered, {report.failed} left out, {report.tokens} tokens in "
        f"{report.seconds:.1f} s ({report.tokens_per_s:.0f} tokens/s), {report.expert_loads} expert sets read"
    )
    if report.failed:
        console.print(f"rows that were left out, and why: {job.side('bad.jsonl').url}", markup=False)
        raise typer.Exit(1)


@contextmanager
def shown(console: Console) -> Iterator[Callable[["Progress"], None]]:
    """A bar for each of the two passes, with rate and time to the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"))
    with Bars(*columns, console=console) as bars:
        known: dict[str, TaskID] = {}

        def on_progress(progress: "Progress") -> None:
            bar = known.get(progress.phase)
            if bar is None:
                bar = known[progress.phase] = bars.add_task(progress.phase, total=progress.total, pace="")
            eta = "" if progress.eta_s is None else f", {_clock(progress.eta_s)} left"
            bars.update(bar, completed=progress.done, pace=f"{progress.rows_per_s:.1f} rows/s{eta}")

        yield on_progress


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
