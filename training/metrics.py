"""Continual-learning metrics of the CoIN benchmark: what is learned, what is kept, what is lost.

It does not know tasks, models or answers: a matrix of scores in, four numbers out.
Read first: `a[t][j]` is the score on task j after stage t, both from 0; only `j <= t` is ever read, so a stage may
leave out the tasks that were not there yet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class ContinualMetrics:
    """The four numbers, in the unit of the scores.

    Args:
        mft: mean of every task right after it was learned, `mean_t a[t][t]`.
        mfn: mean over tasks at the end, `mean_j a[T][j]`.
        maa: mean over stages of the mean over the tasks seen so far, `mean_t mean_{j<=t} a[t][j]`.
        bwt: what the older tasks lost since, `mean_{j<T} (a[T][j] - a[j][j])`; 0 with a single task.
    """

    mft: float
    mfn: float
    maa: float
    bwt: float


def continual_metrics(scores: Sequence[Sequence[float]]) -> ContinualMetrics:
    """MFT, MFN, MAA and BWT (CoIN, arXiv 2403.08350; BWT divides by T - 1).

    Args:
        scores: T rows; row t holds at least t + 1 scores.

    Raises:
        InvalidInputError: no rows, a row is too short, or a score that is read is not finite.
    """
    if not scores:
        raise InvalidInputError("scores", [], "must have a row per stage")
    for stage, row in enumerate(scores):
        if len(row) <= stage or not all(math.isfinite(score) for score in row[: stage + 1]):
            raise InvalidInputError("scores", list(row), f"row {stage} needs {stage + 1} finite scores")
    last = len(scores) - 1
    kept = scores[last]
    learned = [row[stage] for stage, row in enumerate(scores)]
    lost = [kept[j] - learned[j] for j in range(last)]
    return ContinualMetrics(
        mft=_mean(learned),
        mfn=_mean(kept[: last + 1]),
        maa=_mean(seen_means(scores)),
        bwt=_mean(lost) if lost else 0.0,
    )


def seen_means(scores: Sequence[Sequence[float]]) -> list[float]:
    """The forgetting curve: for every stage t the mean over the tasks seen so far, `mean_{j<=t} a[t][j]`."""
    return [_mean(row[: stage + 1]) for stage, row in enumerate(scores)]


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds, with `n - 1`; 0 for a single one."""
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
