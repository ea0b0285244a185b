"""Expansion policies: where a new task gets an expert, from what probing measured."""

from __future__ import annotations

import pytest

from runtime.errors import InvalidInputError
from training.config import TrainingConfig
from training.expansion import Calibrated, Everywhere, LayerUse, Paper, expansion_policy


def uses(*probe_frequencies: float) -> dict[int, LayerUse]:
    return {10 + i: LayerUse((0,), (1 - f, f)) for i, f in enumerate(probe_frequencies)}


def test_everywhere_expands_every_layer_and_needs_no_probing() -> None:
    assert Everywhere().expand(uses(0.0, 1.0)) == {10, 11}
    assert not Everywhere().probes


def test_the_papers_rule_over_layers_expands_those_above_mean_minus_alpha_deviations() -> None:
    # mean 0.4, population deviation sqrt(0.14) = 0.374
    measured = uses(0.0, 0.2, 0.4, 1.0)
    assert Paper("layers", 0.0).expand(measured) == {13}
    assert Paper("layers", 0.5).expand(measured) == {12, 13}  # above 0.213
    assert Paper("layers", 0.6).expand(measured) == {11, 12, 13}  # above 0.175
    assert Paper("layers", 2.0).expand(measured) == {10, 11, 12, 13}


def test_the_papers_rule_over_experts_compares_a_layers_probe_with_that_layers_experts() -> None:
    crowded = LayerUse((0, 1), (0.9, 0.9, 0.2))
    wanted = LayerUse((0, 1), (0.5, 0.6, 0.9))
    assert Paper("experts", 0.0).expand({3: crowded, 4: wanted}) == {4}
    assert Paper("experts", 2.0).expand({3: crowded, 4: wanted}) == {3, 4}


def test_the_papers_rule_adds_nothing_where_all_layers_are_alike() -> None:
    assert Paper("layers", 1.0).expand(uses(0.5, 0.5)) == frozenset()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_the_papers_rule_over_layers_expands_at_least_its_share(alpha: float) -> None:
    # By Cantelli's inequality more than alpha^2 / (1 + alpha^2) of the layers lie above the threshold.
    for pattern in ([0.0] * 9 + [1.0], [1.0] * 9 + [0.0], [i / 10 for i in range(10)]):
        share = len(Paper("layers", alpha).expand(uses(*pattern))) / 10
        assert share >= alpha**2 / (1 + alpha**2)


def test_calibration_expands_where_the_probe_is_missed_and_may_answer_nothing() -> None:
    measured = {i: LayerUse((0,), (0.5, 0.5), rise) for i, rise in enumerate((-0.1, 0.01, 0.02, 0.3))}
    assert Calibrated(0.01).expand(measured) == {2, 3}
    assert Calibrated(1.0).expand(measured) == frozenset()


def test_the_most_used_old_expert_is_the_oldest_of_equals_and_never_the_probe() -> None:
    assert LayerUse((2, 5, 7), (0.1, 0.4, 0.4, 0.9)).most_used == 5
    assert LayerUse((), (1.0,)).most_used is None


def test_an_alpha_below_zero_expands_fewer_layers() -> None:
    measured = uses(0.2, 0.5, 0.7, 0.9)
    assert Paper("layers", 0.0).expand(measured) == {12, 13}
    assert Paper("layers", -0.5).expand(measured) == {13}


def test_a_configuration_names_its_policy() -> None:
    assert expansion_policy(TrainingConfig()) == Everywhere()
    paper = TrainingConfig(expansion="paper", expansion_axis="experts", expansion_alpha=0.25)
    assert expansion_policy(paper) == Paper("experts", 0.25)
    assert expansion_policy(TrainingConfig(expansion="calibrated", expansion_tolerance=0.5)) == Calibrated(0.5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("expansion", "sometimes"),
        ("expansion_axis", "tokens"),
        ("expansion_alpha", float("inf")),
        ("expansion_tolerance", float("nan")),
        ("probe_share", 0.0),
        ("probe_steps", 0),
        ("expert_start", "zero"),
        ("accumulation", 0),
    ],
)
def test_a_wrong_choice_is_named_with_its_value(field: str, value: object) -> None:
    with pytest.raises(InvalidInputError, match=f"^{field}="):
        TrainingConfig(**{field: value})  # type: ignore[arg-type]
