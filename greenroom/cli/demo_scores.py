"""Scores of the demo: exact match with the base alone, with the right task given, and with the locator.

It knows nothing of engines; it asks a running server like any client.
Read first: prompts of all tasks go out mixed, `CONCURRENCY` at a time; a task is named only for the oracle.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from greenroom.client import AsyncClient
from greenroom.results import Answer

CONCURRENCY = 16
MAX_TOKENS = 28


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """Shares, 0..1, of one task's held-out prompts."""

    name: str
    prompts: int
    exact_match_base: float
    exact_match_oracle: float
    exact_match_locator: float
    locator_accuracy: float

    def shares(self) -> tuple[float, float, float, float]:
        """The four shares in the order of the table's columns."""
        return self.exact_match_base, self.exact_match_oracle, self.exact_match_locator, self.locator_accuracy


@dataclass(frozen=True, kw_only=True)
class DemoScores:
    """All tasks, and how the server did; `tokens_per_s` is of the run with the locator."""

    tasks: tuple[TaskScores, ...]
    tokens_per_s: float
    expert_loads: int
    concurrency: int = CONCURRENCY

    def mean(self) -> TaskScores:
        """Mean over the tasks, which all have the same number of prompts."""
        columns = zip(*(task.shares() for task in self.tasks), strict=True)
        base, oracle, locator, accuracy = (sum(column) / len(self.tasks) for column in columns)
        return TaskScores(
            name="mean",
            prompts=sum(task.prompts for task in self.tasks),
            exact_match_base=base,
            exact_match_oracle=oracle,
            exact_match_locator=locator,
            locator_accuracy=accuracy,
        )

    def summary(self) -> dict[str, object]:
        """The figures as JSON holds them."""
        mean = self.mean()
        return {
            "locator_accuracy": mean.locator_accuracy,
            "exact_match_base": mean.exact_match_base,
            "exact_match_oracle": mean.exact_match_oracle,
            "exact_match_locator": mean.exact_match_locator,
            "tokens_per_s": self.tokens_per_s,
            "expert_loads": self.expert_loads,
            "prompts": mean.prompts,
            "tasks": {task.name: task.shares() for task in self.tasks},
        }


async def measure(target: str, data: Path, prompts_per_task: int) -> DemoScores:
    """Ask every held-out prompt three times: plain base, task pinned, task located."""
    from training.data import read_tasks
    from training.score import exact_match

    tasks = read_tasks(data)
    # Row by row over all tasks, so that prompts of different tasks share every batch.
    rounds = zip(*(task.test[:prompts_per_task] for task in tasks), strict=True)
    asked = [(task.name, example) for examples in rounds for task, example in zip(tasks, examples, strict=True)]
    names, inputs = [name for name, _ in asked], [example.input for _, example in asked]
    wanted = [example.output for _, example in asked]
    unnamed = [None] * len(asked)
    async with AsyncClient(target) as client:
        base = await _ask_all(client, inputs, unnamed, base_only=True)
        oracle = await _ask_all(client, inputs, names)
        started = time.monotonic()
        located = await _ask_all(client, inputs, unnamed)
        seconds = time.monotonic() - started
        description = await client.describe()
    rows = []
    for task in tasks:
        at = [i for i, name in enumerate(names) if name == task.name]

        def score(answers: Sequence[Answer], at: Sequence[int] = at) -> float:
            return exact_match([answers[i].text for i in at], [wanted[i] for i in at])

        rows.append(
            TaskScores(
                name=task.name,
                prompts=len(at),
                exact_match_base=score(base),
                exact_match_oracle=score(oracle),
                exact_match_locator=score(located),
                locator_accuracy=sum(located[i].routing.task == task.name for i in at) / len(at),
            )
        )
    return DemoScores(
        tasks=tuple(rows),
        tokens_per_s=sum(answer.usage.completion_tokens for answer in located) / seconds,
        expert_loads=description.memory.loads,
    )


async def _ask_all(
    client: AsyncClient, inputs: Sequence[str], tasks: Sequence[str | None], *, base_only: bool = False
) -> list[Answer]:
    """Answers in the order of the inputs."""
    gate = asyncio.Semaphore(CONCURRENCY)

    async def ask(text: str, task: str | None) -> Answer:
        async with gate:
            return await client.generate(text, task=task, base_only=base_only, max_tokens=MAX_TOKENS)

    return await asyncio.gather(*(ask(text, task) for text, task in zip(inputs, tasks, strict=True)))
