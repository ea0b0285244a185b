"""`greenroom demo`: the whole story on one machine, from nothing to a table of results.

It knows nothing of how each step works: it runs the other subcommands in order and says what they did.
Read first: everything lies in one folder and is made once; run it again and it goes on where it was. `--fresh` starts
over.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from greenroom.cli.answer_view import print_outcome, print_summary
from greenroom.cli.base import get
from greenroom.cli.demo_scores import DemoScores, measure
from greenroom.cli.export import export
from greenroom.cli.train import train
from greenroom.client import AsyncClient
from runtime.errors import UnavailableError

_START_LIMIT_S = 120.0
_STOP_LIMIT_S = 30.0
NO_TASK_PROMPT = "What is the capital of France?"


def demo(
    *,
    folder: Annotated[Path, typer.Option(help="Where data, repertoire and results go.")] = Path("build/demo"),
    results: Annotated[Path, typer.Option(help="JSON file of the measured figures.")] = Path("build/demo.json"),
    prompts_per_task: Annotated[int, typer.Option(min=1, help="Held-out prompts to score, per task.")] = 100,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget earlier data and experts; train again.")] = False,
) -> None:
    """Train three tasks, export, serve, ask over gRPC, and score the answers."""
    console = Console(soft_wrap=True, highlight=False)
    started = time.monotonic()
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    data, repertoire = folder / "data", folder / "repertoire"
    _title(console, "1 base model")
    get("smollm2")
    _title(console, "2 task data")
    _make_data(console, data)
    _title(console, "3 training: tasks arrive one after the other")
    train(repertoire=repertoire, data=str(data))
    _title(console, "4 export to ONNX, verified against torch")
    export(["onnx-locator", "onnx-router"], repertoire=repertoire)
    _title(console, "5 serving")
    with _server(console, folder, repertoire) as target:
        console.print(f"ready after {time.monotonic() - started:.0f} s")
        _title(console, "6 a mixed batch, no task named")
        asyncio.run(_ask_some(target, data))
        _title(console, "7 scores on held-out prompts, over gRPC")
        scores = asyncio.run(measure(target, data, prompts_per_task))
    _title(console, "8 did the newest task change the older ones?")
    from greenroom.cli.demo_growth import old_tasks_bit_identical

    identical = old_tasks_bit_identical(repertoire, data)
    console.print("answers of older tasks before and after the newest task: " + ("equal" if identical else "DIFFERENT"))
    _print_table(console, scores)
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps({**scores.summary(), "old_tasks_bit_identical": identical}, indent=2) + "\n")
    console.print(f"figures in {results}; the whole took {time.monotonic() - started:.0f} s")


def _title(console: Console, text: str) -> None:
    console.rule(f"[bold]{text}", align="left")


def _make_data(console: Console, folder: Path) -> None:
    from training.data import read_tasks
    from training.demo_data import write_demo_data

    if not folder.is_dir():
        write_demo_data(folder)
    for task in read_tasks(folder):
        example = task.train[0]
        console.print(f"{task.name}: {len(task.train)} to train, {len(task.test)} held out", style="bold")
        console.print(f"  {example.input!r} -> {example.output!r}", markup=False)


@contextmanager
def _server(console: Console, folder: Path, repertoire: Path) -> Iterator[str]:
    """A server in a process of its own; yields HOST:PORT, and ends it with SIGTERM."""
    ready, log = folder / "port", folder / "server.log"
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "greenroom.cli.main", "serve", "--repertoire", str(repertoire), "--port", "0"]
    command += ["--ready-file", str(ready)]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)  # noqa: S603 - our own command
        try:
            with console.status("loading the base model"):
                port = _wait_for_port(process, ready, log)
            console.print(f"serving on 127.0.0.1:{port}; its log is {log}")
            yield f"127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for_port(process: "subprocess.Popen[bytes]", ready: Path, log: Path) -> int:
    until = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < until:
        if ready.is_file():
            return int(ready.read_text())
        if process.poll() is not None:
            raise UnavailableError(f"the server ended with exit code {process.returncode}; see {log}")
        time.sleep(0.1)
    raise UnavailableError(f"the server was not ready after {_START_LIMIT_S:.0f} s; see {log}")


async def _ask_some(target: str, data: Path) -> None:
    from training.data import read_tasks

    prompts = [example.input for task in read_tasks(data) for example in task.test[:2]]
    async with AsyncClient(target) as client:
        asked = [*prompts, NO_TASK_PROMPT]
        answers = await asyncio.gather(*(client.generate(prompt, max_tokens=48) for prompt in asked))
    for prompt, answer in zip(asked, answers, strict=True):
        print_outcome(prompt, answer)
    print_summary(answers)


def _print_table(console: Console, scores: DemoScores) -> None:
    table = Table("task", "prompts", "base alone", "oracle task", "located", "located right", title="exact match")
    for row in (*scores.tasks, scores.mean()):
        table.add_row(row.name, str(row.prompts), *(f"{share:.1%}" for share in row.shares()))
    console.print(table)
    console.print(
        f"{scores.tokens_per_s:.0f} tokens/s with {scores.concurrency} prompts at once; "
        f"{scores.expert_loads} experts read from disk, {os.cpu_count()} cores"
    )
