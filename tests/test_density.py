"""Densities, scores and the pre-filter of the locator, against short reference formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from runtime.model.density import (
    PROJECTED,
    background_error,
    density_shapes,
    encode,
    narrowest,
    negative_elbo,
    pack,
    raw_error,
    reconstruction_error,
    squared_distance,
    vae_shapes,
    views,
)
from runtime.model.locator import Locator, project
from runtime.model.manifest import Density, LocatorEntry, LocatorRef, Score
from training.locator import low_rank_gaussian, make_background, make_frame

WIDTH = 300
DENSITIES: tuple[Density, ...] = ("vae", "gaussian", "low_rank")


def points(num: int, seed: int, *, spread: float = 1.0) -> torch.Tensor:
    return spread * torch.randn(num, PROJECTED, generator=torch.Generator().manual_seed(seed))


def tensors_of(density: Density, seed: int) -> dict[str, torch.Tensor]:
    if density == "vae":
        generator = torch.Generator().manual_seed(seed)
        vae = {name: torch.randn(shape, generator=generator) / 8 for name, shape in vae_shapes().items()}
        return {**vae, "mean": vae["output.bias"]}
    rows = points(80, seed) * torch.linspace(0.2, 2, PROJECTED) + points(1, seed + 1000)
    return low_rank_gaussian(rows) if density == "low_rank" else {"mean": rows.mean(0)}


def locator_of(density: Density, num_tasks: int, *, score: Score = "raw", nearest: int = 32) -> Locator:
    frame = {"mean": torch.zeros(WIDTH), "deviation": torch.ones(WIDTH), "projection": torch.eye(WIDTH, PROJECTED)}
    entries = []
    for task in range(num_tasks):
        record = LocatorEntry(digest="0" * 64, mean=0.5 + task / 100, sd=0.1 + task / 50, threshold=1e9)
        entries.append((f"task-{task}", tensors_of(density, task), record))
    return Locator(frame, entries, score=score, density=density, beta=0.3, nearest=nearest)


def features(num: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(num, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("density", DENSITIES)
def test_packed_densities_come_back_as_they_were(density: Density) -> None:
    tensors = [tensors_of(density, seed) for seed in range(3)]
    found = views(density, pack(density, tensors))
    assert {name: tuple(t.shape[1:]) for name, t in found.items()} == density_shapes(density)
    for i, one in enumerate(tensors):
        assert all(torch.equal(found[name][i], one[name]) for name in found)


def test_the_squared_distance_is_the_mean_over_dimensions() -> None:
    means, rows = points(3, 1), points(4, 2)
    wanted = torch.stack([(rows - mean).square().mean(1) for mean in means], dim=1)
    torch.testing.assert_close(squared_distance(means, rows), wanted, rtol=1e-4, atol=1e-5)


def test_a_low_rank_gaussian_is_the_log_likelihood_of_its_covariance() -> None:
    rows = points(400, 1) * torch.linspace(0.2, 3, PROJECTED)
    tensors = low_rank_gaussian(rows)
    variances = 1 / (tensors["precision"] - tensors["gains"]).double()
    directions, rest = tensors["directions"].double(), float(1 / tensors["precision"])
    covariance = rest * torch.eye(PROJECTED, dtype=torch.float64)
    covariance += directions.t() @ torch.diag(variances - rest) @ directions
    normal = torch.distributions.MultivariateNormal(tensors["mean"].double(), covariance)
    asked = points(5, 3)
    constant = PROJECTED * torch.log(torch.tensor(2 * torch.pi))
    wanted = (-2 * normal.log_prob(asked.double()) - constant) / PROJECTED
    found = raw_error("low_rank", {name: t.unsqueeze(0) for name, t in tensors.items()}, asked)[:, 0]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3)


def contrasted(locator: Locator, background: dict[str, torch.Tensor], threshold: float) -> Locator:
    record = LocatorEntry(digest="0" * 64, mean=0.0, sd=1.0, threshold=threshold)
    tensors = [{name: t[i] for name, t in locator.stacked.items()} for i in range(len(locator.tasks))]
    entries = [(task, one, record) for task, one in zip(locator.tasks, tensors, strict=True)]
    return Locator(locator.frame, entries, score="raw", density=locator.density, background=background)


def test_the_background_is_1_3_times_the_log_likelihood_of_independent_dimensions() -> None:
    reference = torch.randn(500, 64, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.1, 5, 64)
    frame = make_frame(reference, seed=0, density="low_rank")
    background = make_background(frame, reference)
    spread = (background["precision"].double() / 1.3).rsqrt()
    normal = torch.distributions.Normal(background["mean"].double(), spread)
    asked = points(5, 3)
    constant = PROJECTED * torch.log(torch.tensor(2 * torch.pi))
    wanted = 1.3 * (-2 * normal.log_prob(asked.double()).sum(1, keepdim=True) - constant) / PROJECTED
    torch.testing.assert_close(background_error(background, asked).double(), wanted, rtol=1e-4, atol=1e-4)
    projected = project(frame, reference)
    torch.testing.assert_close(background["mean"], projected.mean(0), rtol=0, atol=1e-4)
    torch.testing.assert_close(1.3 / background["precision"], 0.7 * projected.var(0) + 0.3, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("density", ["gaussian", "low_rank"])
def test_against_a_background_the_order_of_tasks_stays_and_only_who_is_refused_changes(density: Density) -> None:
    plain = locator_of(density, 5)
    background = {"mean": points(1, 5)[0], "precision": torch.linspace(0.5, 2, PROJECTED), "volume": torch.ones(1)}
    asked = features(30)
    errors = plain.errors(asked) - background_error(background, project(plain.frame, asked))
    threshold = float(errors.min(1).values.median())
    against = contrasted(plain, background, threshold)
    torch.testing.assert_close(against.errors(asked), errors)
    found, before = against.locate(asked), plain.locate(asked)
    assert [one.scores[0][0] for one in found] == [one.scores[0][0] for one in before]
    assert [one.margin for one in found] == pytest.approx([one.margin for one in before], abs=1e-4)
    assert [one.task is None for one in found] == (errors.min(1).values > threshold).tolist()


def test_at_unit_length_only_the_direction_of_a_projected_feature_counts() -> None:
    plain = locator_of("low_rank", 3)
    shapes = {name: torch.zeros(WIDTH) if name == "mean" else t for name, t in plain.frame.items()}
    asked, lengths = features(6), torch.tensor([[0.01], [0.5], [1.0], [2.0], [30.0], [4000.0]])
    seen = project(shapes, asked, unit_length=True)
    torch.testing.assert_close(seen.norm(dim=1), torch.full((6,), 16.0))
    torch.testing.assert_close(project(shapes, asked * lengths, unit_length=True), seen, rtol=1e-4, atol=1e-5)
    free = project(shapes, asked)
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(seen, free), torch.ones(6))
    assert torch.equal(project(shapes, torch.zeros(1, WIDTH), unit_length=True), torch.zeros(1, PROJECTED))


def test_a_locator_sees_features_at_unit_length_where_its_repertoire_says_so() -> None:
    plain = locator_of("low_rank", 20, nearest=5)
    unit = plain.scored_by("raw")
    unit.unit_length = True
    asked = features(6) + plain.prototypes[0].norm()
    stretched = unit.project(asked)
    wanted = torch.nn.functional.pad(stretched, (0, WIDTH - PROJECTED))
    assert torch.equal(unit.candidates(asked), plain.candidates(wanted))
    torch.testing.assert_close(unit.errors(asked), plain.errors(wanted))
    for found, same in zip(unit.locate(asked), plain.locate(wanted), strict=True):
        assert [task for task, _ in found.scores] == [task for task, _ in same.scores]


def test_what_is_unusual_for_every_prompt_counts_against_no_task() -> None:
    locator = locator_of("low_rank", 1)
    near = torch.nn.functional.pad(locator.prototypes, (0, WIDTH - PROJECTED))
    odd = near.clone()
    odd[:, 200] += 30.0
    precise = float(locator.stacked["precision"])
    background = {
        "mean": locator.prototypes[0],
        "precision": torch.full((PROJECTED,), precise),
        "volume": torch.zeros(1),
    }
    against = contrasted(locator, background, 0.0)
    rise = float((locator.errors(odd) - locator.errors(near)).item())
    rise_against = float((against.errors(odd) - against.errors(near)).item())
    assert rise > 1
    assert rise_against < rise / 100


def test_the_negative_elbo_is_the_training_loss_at_the_latent_mean() -> None:
    weights = views("vae", pack("vae", [tensors_of("vae", 1), tensors_of("vae", 2)]))
    rows = points(3, 4)
    mean, log_variance = encode(weights, rows.unsqueeze(0).expand(2, -1, -1))
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    divergence = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(2).t()
    wanted = reconstruction_error(weights, rows) + 0.7 * divergence / PROJECTED
    torch.testing.assert_close(negative_elbo(weights, rows, 0.7), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("density", "score"),
    [("vae", "raw"), ("vae", "neg_elbo"), ("vae", "z"), ("low_rank", "abs_z"), ("gaussian", "z"), ("low_rank", "raw")],
)
def test_the_prefilter_changes_nothing_while_no_more_than_the_nearest_are_there(density: Density, score: Score) -> None:
    everything, exact = (locator_of(density, 6, score=score, nearest=nearest) for nearest in (100, 6))
    assert everything.locate(features(9)) == exact.locate(features(9))


@pytest.mark.parametrize(
    ("density", "score"), [("vae", "raw"), ("vae", "neg_elbo"), ("low_rank", "z"), ("gaussian", "raw")]
)
def test_the_prefilter_asks_the_tasks_with_the_nearest_prototypes_and_scores_them_alike(
    density: Density, score: Score
) -> None:
    some, everything = (locator_of(density, 20, score=score, nearest=nearest) for nearest in (5, 100))
    asked_of = features(8)
    distances = squared_distance(some.prototypes, project(some.frame, asked_of))
    for row, asked in enumerate(some.candidates(asked_of).tolist()):
        assert asked == distances[row].argsort()[:5].tolist()
    for found, wanted, asked in zip(
        some.locate(asked_of), everything.locate(asked_of), some.candidates(asked_of).tolist(), strict=True
    ):
        names = {some.tasks[i] for i in asked}
        assert {task for task, _ in found.scores} == names
        scores = dict(wanted.scores)
        assert [value for _, value in found.scores] == pytest.approx(sorted(scores[name] for name in names), abs=1e-4)
        assert found.task == min(names, key=lambda name: scores[name])


def test_a_prompt_beside_its_prototype_is_never_filtered_out() -> None:
    locator = locator_of("low_rank", 50, nearest=3)
    near = torch.nn.functional.pad(locator.prototypes + 0.01 * points(50, 9), (0, WIDTH - PROJECTED))
    assert all(task in asked for task, asked in enumerate(locator.candidates(near).tolist()))


def test_a_vae_without_a_stored_prototype_gets_what_it_decodes_from_zero() -> None:
    tensors = tensors_of("vae", 1)
    mean = tensors.pop("mean")
    record = LocatorEntry(digest="0" * 64, mean=0.0, sd=1.0, threshold=1.0)
    frame = locator_of("vae", 1).frame
    both = Locator(frame, [("a", tensors, record), ("b", {**tensors, "mean": mean}, record)], score="raw")
    hidden = torch.relu(tensors["decode.bias"])
    torch.testing.assert_close(both.prototypes[0], tensors["output.weight"] @ hidden + tensors["output.bias"])
    assert torch.equal(both.prototypes[1], mean)


def test_another_score_shares_the_densities_and_leaves_the_first_alone() -> None:
    raw = locator_of("vae", 4)
    z = raw.scored_by("z")
    errors = raw.errors(features(3))
    torch.testing.assert_close(z.scores(errors), (errors - raw.means) / raw.deviations)
    assert raw.score == "raw"
    assert z.prototypes is raw.prototypes
    with pytest.raises(ValueError, match="neg_elbo does not follow"):
        raw.scored_by("neg_elbo").scores(errors)


def test_a_whitened_frame_makes_the_reference_round_and_stays_when_tasks_come() -> None:
    reference = torch.randn(2000, 64, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.1, 5, 64)
    frame = make_frame(reference, seed=0, density="gaussian")
    projected = project(frame, reference)
    variances = projected.var(0)[:64]
    assert float(variances.max() / variances.min()) < 1.5
    assert torch.equal(projected[:, 64:], torch.zeros(2000, PROJECTED - 64))
    assert torch.equal(frame["projection"], make_frame(reference, seed=1, density="gaussian")["projection"])


def test_a_prompt_has_the_same_surprise_alone_as_among_others() -> None:
    fitted = [low_rank_gaussian(points(60, seed)) for seed in range(3)]
    weights, asked = views("low_rank", pack("low_rank", fitted)), points(5, 8)
    alone = torch.cat([raw_error("low_rank", weights, row.unsqueeze(0)) for row in asked])
    torch.testing.assert_close(alone, raw_error("low_rank", weights, asked), rtol=1e-5, atol=1e-5)


def test_densities_are_held_in_half_the_memory_where_that_loses_nothing() -> None:
    fitted = [low_rank_gaussian(points(60, seed)) for seed in range(3)]
    rows = pack("low_rank", fitted)
    assert narrowest(rows).dtype == torch.float16
    assert torch.equal(narrowest(rows).float(), rows)
    assert narrowest(rows + 1e-6).dtype == torch.float32
    record = LocatorEntry(digest="0" * 64, mean=0.0, sd=1.0, threshold=1e9)
    frame = {"mean": torch.zeros(WIDTH), "deviation": torch.ones(WIDTH), "projection": torch.eye(WIDTH, PROJECTED)}
    locator = Locator(frame, [(str(i), one, record) for i, one in enumerate(fitted)], score="raw", density="low_rank")
    assert all(torch.equal(locator.stacked[name][1], fitted[1][name]) for name in fitted[1])


@pytest.mark.parametrize("num", [3, 20, 60, 200])
def test_a_low_rank_gaussian_of_few_rows_is_that_of_their_covariance(num: int) -> None:
    rows = points(num, 4) * torch.linspace(0.2, 3, PROJECTED)
    found = low_rank_gaussian(rows)
    covariance = 0.4 * torch.cov(rows.double().t()) + 0.6 * torch.eye(PROJECTED, dtype=torch.float64)
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(covariance))
    rest = values[32:].mean()
    torch.testing.assert_close(found["precision"].double(), (1 / rest).reshape(1), rtol=1e-3, atol=0)
    torch.testing.assert_close(found["gains"].double(), 1 / rest - 1 / values[:32], rtol=1e-3, atol=1e-4)
    wanted = values[:32].log().sum() + (PROJECTED - 32) * rest.log()
    torch.testing.assert_close(found["volume"].double(), wanted.reshape(1), rtol=1e-3, atol=1e-3)
    asked = points(5, 7).double()
    along = (asked @ found["directions"].double().t()).square() @ found["gains"].double()
    straight = (asked @ vectors[:, :32]).square() @ (1 / rest - 1 / values[:32])
    torch.testing.assert_close(along, straight, rtol=5e-3, atol=1e-2)


@pytest.mark.parametrize("width", [64, PROJECTED, 576])
@pytest.mark.parametrize("density", DENSITIES)
def test_a_frame_of_any_width_can_be_saved(density: Density, width: int) -> None:
    reference = torch.randn(300, width, generator=torch.Generator().manual_seed(3))
    frame = make_frame(reference, seed=0, density=density)
    assert {name: tensor.shape for name, tensor in load(save(frame)).items()} == {
        "mean": (width,),
        "deviation": (width,),
        "projection": (width, PROJECTED),
    }


def test_errors_of_a_vae_are_no_likelihoods_so_a_manifest_takes_no_background_with_them() -> None:
    given: dict[str, Any] = {"frame": "ab" * 32, "feature": "residual_mean", "layer": 2, "score": "raw"}
    with pytest.raises(ValueError, match="feature=residual_parts: the density must be"):
        LocatorRef(**{**given, "feature": "residual_parts"}, density="vae")
    taken = LocatorRef(**given, density="low_rank", background="cd" * 32)
    assert taken.blob_digests() == {"ab" * 32, "cd" * 32}
    with pytest.raises(ValueError, match="background: errors of a vae"):
        LocatorRef(**given, density="vae", background="cd" * 32)
