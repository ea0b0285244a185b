"""Continual metrics against matrices that were worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from runtime.errors import InvalidInputError
from training.metrics import ContinualMetrics, continual_metrics, seen_means, spread


def test_the_four_numbers_of_a_matrix_that_was_worked_out_by_hand() -> None:
    scores = [[90.0], [60.0, 80.0], [30.0, 70.0, 50.0]]
    found = continual_metrics(scores)
    assert found.mft == pytest.approx((90 + 80 + 50) / 3)
    assert found.mfn == pytest.approx((30 + 70 + 50) / 3)
    assert found.maa == pytest.approx((90 + 70 + 50) / 3)
    assert found.bwt == pytest.approx(((30 - 90) + (70 - 80)) / 2)


def test_nothing_forgotten_is_a_backward_transfer_of_zero() -> None:
    kept = continual_metrics([[0.4], [0.4, 0.7], [0.4, 0.7, 0.1]])
    assert (kept.mft, kept.mfn, kept.bwt) == (pytest.approx(0.4), pytest.approx(0.4), 0.0)


def test_what_older_tasks_gain_counts_as_positive() -> None:
    assert continual_metrics([[50.0], [60.0, 10.0]]).bwt == 10.0


def test_a_single_task_has_nothing_to_forget() -> None:
    assert continual_metrics([[33.0]]) == ContinualMetrics(mft=33.0, mfn=33.0, maa=33.0, bwt=0.0)


def test_tasks_that_were_not_there_yet_are_never_read() -> None:
    full = [[90.0, math.nan, 1.0], [60.0, 80.0, 99.0], [30.0, 70.0, 50.0]]
    assert continual_metrics(full) == continual_metrics([row[: t + 1] for t, row in enumerate(full)])


def test_the_forgetting_curve_is_the_mean_over_the_tasks_seen_so_far() -> None:
    assert seen_means([[90.0], [60.0, 80.0], [30.0, 70.0, 50.0]]) == [90.0, 70.0, 50.0]


@pytest.mark.parametrize(
    ("scores", "problem"),
    [
        ([], "a row per stage"),
        ([[]], "row 0 needs 1 finite scores"),
        ([[1.0], [1.0]], "row 1 needs 2 finite scores"),
        ([[1.0], [math.nan, 1.0]], "row 1 needs 2 finite scores"),
    ],
)
def test_a_matrix_with_a_hole_is_refused(scores: Sequence[Sequence[float]], problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        continual_metrics(scores)


def test_the_spread_over_seeds_is_the_deviation_of_a_sample() -> None:
    assert spread([1.0, 2.0, 3.0]) == 1.0
    assert spread([7.0]) == 0.0
