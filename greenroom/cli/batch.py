"""`greenroom batch`: answer the lines of a JSONL file offline.

It knows nothing of engines or rows (`runtime.batch`); it reads options, shows progress and says what happened.
Read first: bad lines go to stderr one by one and make the exit code 1; the others are answered all the same.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from greenroom.cli import engine_flags as flags
from runtime.engine.request import SamplingParams
from runtime.errors import DataError, InvalidInputError

_DEFAULT = SamplingParams()


def batch(
    source: Annotated[Path, typer.Argument(help="JSONL with `input`, and optionally `task` and `max_tokens`.")],
    target: Annotated[Path, typer.Argument(help="JSONL to write; it appears when the last row is done.")],
    *,
    repertoire: flags.RepertoireFlag,
    trust: flags.TrustFlag = None,
    base: flags.BaseFlag = None,
    max_tokens: Annotated[
        int, typer.Option(help="New tokens at most, where a row does not say.")
    ] = _DEFAULT.max_tokens,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = _DEFAULT.temperature,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    expert_memory: flags.ExpertMemoryFlag = flags.DEFAULT_EXPERT_MEMORY,
    kv_memory: flags.KvMemoryFlag = flags.DEFAULT_KV_MEMORY,
    max_running: flags.MaxRunningFlag = flags.LIMITS.max_running,
    policy: flags.PolicyFlag = flags.LIMITS.policy,
    eviction: flags.EvictionFlag = flags.LIMITS.eviction,
    prefetch: flags.PrefetchFlag = flags.LIMITS.prefetch,
    dtype: flags.DtypeFlag = flags.DEFAULT_DTYPE,
    step: flags.StepFlag = flags.DEFAULT_STEP,
    threads: flags.ThreadsFlag = flags.DEFAULT_THREADS,
) -> None:
    """Answer every line of a JSONL file; the tasks are located."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    if not source.is_file():
        raise InvalidInputError("source", str(source), "is not a file")
    if not target.parent.is_dir():
        raise InvalidInputError("target", str(target), "its folder does not exist")
    chosen = flags.collect(
        repertoire=repertoire,
        trust=trust,
        base=base,
        dtype=dtype,
        step=step,
        threads=threads,
        expert_memory=expert_memory,
        kv_memory=kv_memory,
        max_running=max_running,
        policy=policy,
        eviction=eviction,
        prefetch=prefetch,
    )
    from greenroom.cli.build_engine import build_engine
    from runtime.batch import run_batch

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with console.status("loading the base model"):
        engine = build_engine(chosen)
    engine.start()
    with source.open("rb") as lines:
        total = sum(1 for line in lines if line.strip())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console) as bars:
            bar = bars.add_task("answering", total=total)

            def report_bad_line(error: DataError) -> None:
                console.print(f"skipped {error}", markup=False)

            report = run_batch(
                engine,
                source,
                target,
                sampling=sampling,
                on_progress=lambda done: bars.update(bar, completed=done),
                on_bad_line=report_bad_line,
            )
    finally:
        engine.close()
    console.print(
        f"{report.answered} of {report.rows} rows answered, {report.failed} skipped, {report.tokens} tokens in "
        f"{report.seconds:.1f} s ({report.tokens / report.seconds:.0f} tokens/s), {report.expert_loads} experts read"
    )
    if report.failed:
        raise typer.Exit(1)
