"""The progress of training as people at a terminal see it, and as a log keeps it.

It does not know what is trained.
Read first: the loss shown is smoothed; it says little of a single batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

OnPhase = Callable[[str], None]
OnStep = Callable[[int, int, float], None]

_SMOOTHING = 0.9


@contextmanager
def progress_bar(console: Console, name: str) -> Iterator[tuple[OnPhase, OnStep]]:
    """A bar with the smoothed loss, or ten lines where nobody looks.

    Yields:
        what `training.grow.add_task` calls when a phase begins, and after every step.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        bar = bars.add_task(name, total=None, loss=float("nan"))
        smooth: list[float] = []

        def on_progress(step: int, num_steps: int, loss: float) -> None:
            smooth.append(_SMOOTHING * smooth[-1] + (1 - _SMOOTHING) * loss if smooth else loss)
            bars.update(bar, completed=step, total=num_steps, loss=smooth[-1])
            if not console.is_terminal and step * 10 // num_steps > (step - 1) * 10 // num_steps:
                console.print(f"{name}: step {step} of {num_steps}, loss {smooth[-1]:.3f}")

        def on_phase(phase: str) -> None:
            bars.update(bar, description=f"{name}: {phase}")
            if not console.is_terminal:
                console.print(f"{name}: {phase}")

        yield on_phase, on_progress
