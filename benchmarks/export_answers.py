"""How well an exported whole model answers the rows of a folder of tasks: what its precision costs where it counts.

It knows nothing of how the file was made; `benchmarks/export.py --data` calls it for every precision.
Read first: every row is asked with its own task's mixture. Prompts of equal length share a batch, whatever their task,
so no padding changes an answer. Perplexity is that of the right answers, end token included, behind their prompts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from exporters.mixture_inputs import mixture_inputs
from exporters.model_session import ModelSession
from runtime.model.base import BaseModel
from runtime.model.generation import open_generation
from runtime.model.repertoire import Repertoire
from training.data import Example, read_tasks
from training.score import is_exact

BATCH_SIZE = 25
SPARE_TOKENS = 2  # the end token, and one more than was asked for shows that an answer goes on


@dataclass(frozen=True)
class Row:
    """One held-out row of a task, as token ids; `answer` ends with the end token."""

    task: str
    example: Example
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def read_rows(base: BaseModel, repertoire: Repertoire, data: Path, per_task: int) -> list[Row]:
    """The first `per_task` held-out rows of every task of the current generation that has a folder in `data`."""
    generation = open_generation(repertoire)
    rows = []
    for task in read_tasks(data):
        if task.name not in generation.manifest.task_names():
            continue
        for example in task.test[:per_task]:
            prompt = generation.template.encode(base.tokenizer, example.input)
            answer = base.tokenizer(example.output, add_special_tokens=False).input_ids
            rows.append(Row(task.name, example, tuple(prompt), (*answer, base.eos_token_ids[0])))
    return rows


@torch.no_grad()
def score(path: Path, base: BaseModel, repertoire: Repertoire, rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Exact match and perplexity of the right answers, per task."""
    session = None
    right: dict[str, int] = defaultdict(int)
    loss: dict[str, float] = defaultdict(float)
    asked: dict[str, int] = defaultdict(int)
    tokens: dict[str, int] = defaultdict(int)
    for batch in _batches(rows):
        slots = mixture_inputs(repertoire, open_generation(repertoire), [row.task for row in batch])
        if session is None:
            session = ModelSession(path, slots)
        ids = torch.tensor([row.prompt for row in batch])
        session.start(slots)
        answers = session.answer(ids, max(len(row.answer) for row in batch) + SPARE_TOKENS - 1).tolist()
        longest = max(len(row.answer) for row in batch)
        forced = torch.tensor([[*row.answer, *row.answer[-1:] * (longest - len(row.answer))] for row in batch])
        session.start(slots)
        logits = session.step(torch.cat([ids, forced[:, :-1]], dim=1), keep=longest)
        for row, answer, scores in zip(batch, answers, logits, strict=True):
            end = next((i for i, token in enumerate(answer) if token in base.eos_token_ids), len(answer))
            right[row.task] += is_exact(base.tokenizer.decode(answer[:end]), row.example.output)
            wanted = torch.tensor(row.answer)
            loss[row.task] += float(torch.nn.functional.cross_entropy(scores[: len(wanted)], wanted, reduction="sum"))
            asked[row.task] += 1
            tokens[row.task] += len(wanted)
    return {
        task: {"exact_match": right[task] / asked[task], "perplexity": math.exp(loss[task] / tokens[task])}
        for task in asked
    }


def _batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    by_length: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        by_length[len(row.prompt)].append(row)
    for length in sorted(by_length):
        alike = by_length[length]
        for start in range(0, len(alike), BATCH_SIZE):
            yield alike[start : start + BATCH_SIZE]
