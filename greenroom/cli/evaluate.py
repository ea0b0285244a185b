"""`greenroom evaluate`: methods of learning tasks in sequence, compared on a folder of tasks.

It does not know how they learn or how they are scored (`training.contest`); it reads options and writes the results.
Read first: what is finished is kept in `--work`, so the command can be run again after an interruption, or with more
seeds or methods.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from greenroom.cli.places import cache_folder
from greenroom.cli.train import device_name
from runtime.errors import InvalidInputError
from training.config import Dtype, Expansion, TrainingConfig

if TYPE_CHECKING:
    from training.contest import Contest
    from training.located import Record

_DEFAULT = TrainingConfig(expansion="paper")


def evaluate(
    *,
    data: Annotated[Path, typer.Option(help="Folder of <task>/train.jsonl and test.jsonl.")],
    tasks: Annotated[str, typer.Option(help="Tasks in the order of their arrival: a,b,c.")],
    output: Annotated[Path, typer.Option(help="Results as FILE.json; a table and pictures beside it.")],
    work: Annotated[Path, typer.Option(help="Folder that keeps what is finished.")],
    lookalike: Annotated[str, typer.Option(help="Tasks that resemble one another: a,b.")] = "",
    held_out: Annotated[
        str | None, typer.Option(help="Tasks that nobody learns: d,e; default: all others of the folder.")
    ] = None,
    methods: Annotated[str | None, typer.Option(help="Compare only these: zero_shot,pgke; default: all.")] = None,
    seeds: Annotated[str, typer.Option(help="Repeat with these seeds: 0,1,2.")] = "0",
    base: Annotated[str, typer.Option(help="A known base, or the folder of a local one.")] = "smollm2",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Of the frozen base: auto, float32 or bfloat16.")] = _DEFAULT.dtype,
    train_rows: Annotated[int, typer.Option(min=8, help="Examples to learn per task, at most.")] = 800,
    test_rows: Annotated[int, typer.Option(min=1, help="Questions per task, at most.")] = 100,
    first_layer: Annotated[
        int | None, typer.Option(help="Lowest layer with experts; default: a third of the depth.")
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of an expert.")] = _DEFAULT.rank,
    max_steps: Annotated[int, typer.Option(min=1, help="Steps per task.")] = 90,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = _DEFAULT.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Peak rate of the experts.")] = _DEFAULT.learning_rate,
    expansion: Annotated[Expansion, typer.Option(help="How PGKE chooses layers.")] = _DEFAULT.expansion,
    expansion_alpha: Annotated[
        float, typer.Option(help="Of paper: expand above mean - alpha * deviation.")
    ] = _DEFAULT.expansion_alpha,
    expansion_tolerance: Annotated[
        float, typer.Option(help="Of calibrated: nats per token that masking a probe may cost.")
    ] = _DEFAULT.expansion_tolerance,
    probe_steps: Annotated[int, typer.Option(help="Steps of the probes.")] = _DEFAULT.probe_steps,
    relocate: Annotated[
        bool, typer.Option("--relocate", help="Fit the locator anew for experts that are trained already.")
    ] = False,
) -> None:
    """Compare ways to learn tasks one after the other: what is learned, kept and lost, and what each trains."""
    from training.subject import check_tasks, other_tasks

    console = Console(soft_wrap=True, highlight=False, stderr=True)
    learned, alike = _names(tasks), _names(lookalike)
    strangers = other_tasks(data, learned) if held_out is None else _names(held_out)
    check_tasks(data, "tasks", learned)
    check_tasks(data, "held_out", strangers)
    for name in alike:
        if name not in learned:
            raise InvalidInputError("lookalike", name, f"is not one of the tasks {', '.join(learned)}")
    for name in strangers:
        if name in learned:
            raise InvalidInputError("held_out", name, "is one of the tasks that are learned")

    import torch

    from runtime.kernels.freed_memory import keep_freed_memory
    from runtime.model.base import load_base, resolve_base
    from training.contenders import REPORTS
    from training.contest import CONTENDERS, Contest, run_contest
    from training.contest_result import growth_of, result_of, table
    from training.forgetting_curve import draw_forgetting_curve
    from training.pictures import can_draw, draw_growth
    from training.precision import base_dtype
    from training.report import read_reports

    chosen = CONTENDERS if methods is None else _names(methods)
    for name in chosen:
        if name not in CONTENDERS:
            raise InvalidInputError("methods", name, f"must be among {', '.join(CONTENDERS)}")
    keep_freed_memory()
    place = torch.device(device_name(device, has_cuda=torch.cuda.is_available()))
    model = load_base(resolve_base(base, cache=cache_folder()), dtype=base_dtype(dtype, place), device=place)
    contest = Contest(
        data=data,
        tasks=learned,
        strangers=strangers,
        contenders=chosen,
        train_rows=train_rows,
        test_rows=test_rows,
        first_layer=model.info.num_layers // 3 if first_layer is None else first_layer,
        relocate=relocate,
    )
    started, runs = time.monotonic(), {}
    for seed in _whole_numbers("seeds", seeds):
        config = TrainingConfig(
            seed=seed,
            dtype=dtype,
            rank=rank,
            max_steps=max_steps,
            epochs=max_steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            expansion=expansion,
            expansion_alpha=expansion_alpha,
            expansion_tolerance=expansion_tolerance,
            probe_steps=probe_steps,
        )
        runs[seed] = run_contest(model, contest, config, work, on_stage=_teller(console, contest))
    origin = made_by(model.info.name, str(model.model.dtype), place.type)
    settings: dict[str, Any] = {
        "train_rows": train_rows,
        "test_rows": test_rows,
        "steps": max_steps,
        "batch_size": batch_size,
    }
    settings |= {
        "expansion": expansion,
        "probe_steps": probe_steps,
        "rank": rank,
        "learning_rate": learning_rate,
        "first_layer": contest.first_layer,
    }
    result = origin | {"settings": settings | {"held_out": list(strangers)}}
    result |= result_of(runs, tasks=learned, lookalikes=alike)
    reports = {seed: read_reports(work / f"seed{seed}" / "pgke" / REPORTS) for seed in runs if "pgke" in chosen}
    result["growth"] = {seed: [growth_of(report) for report in found] for seed, found in reports.items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(table(result), encoding="utf-8")
    if can_draw():
        draw_forgetting_curve(result, output.with_suffix(".png"))
        for found in [found for found in reports.values() if found][:1]:
            draw_growth(found, output.with_name(f"{output.stem}-growth.png"))
    typer.echo(table(result))
    console.print(f"{output} written after {time.monotonic() - started:.0f} s")


def made_by(base: str, dtype: str, device: str) -> dict[str, Any]:
    """Machine and command; folders are not told."""
    import torch

    program = Path(sys.argv[0])
    is_script = program.suffix == ".py" and program.stem != "main"
    command, hide = [f"python {program.parent.name}/{program.name}" if is_script else "greenroom"], False
    for word in sys.argv[1:]:
        flag, equals, _ = word.partition("=")
        folder = flag in ("--data", "--work", "--output", "--base")
        command.append(f"{flag}=PATH" if folder and equals else "PATH" if hide and os.sep in word else word)
        hide = folder and not equals
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {device}"
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    return {"machine": f"{machine}; {versions}", "command": " ".join(command), "base": base, "dtype": dtype}


def _teller(console: Console, contest: Contest) -> Any:  # noqa: ANN401 - an `OnStage`, which would load torch
    def tell(seed: int, name: str, stage: int, record: Record) -> None:
        scores = record["located"] if "located" in record else record["given"]
        shown = " ".join(f"{100 * score:.0f}" for score in scores)
        seconds = f"{record['learn_s']:.0f} s + {record['score_s']:.0f} s"
        console.print(f"seed {seed} {name} after {contest.tasks[stage]}: {shown} ({seconds})")

    return tell


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _whole_numbers(field: str, text: str) -> tuple[int, ...]:
    found = _names(text)
    if not found or not all(word.isdigit() for word in found):
        raise InvalidInputError(field, text, "must be whole numbers: 0,1,2")
    return tuple(dict.fromkeys(int(word) for word in found))
