"""Exported graphs of locator and routers: what they compute, and that a wrong one is found out.

Read first: `generation` has random densities and an expert set that lacks a layer, so that every constant of a graph
matters.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from exports import change_constant, quiet, run
from repertoires import Workshop

from exporters.onnx_locator import locator_cases, write_locator
from exporters.onnx_router import router_cases, router_columns, write_routers
from exporters.targets import export
from exporters.verify import SIZES, Case, Wanted, verify
from runtime.errors import (
    ExportMismatchError,
    InvalidInputError,
)
from runtime.kernels.routing import top_k_weights
from runtime.model.densities import Densities
from runtime.model.density import background_shapes, vae_shapes
from runtime.model.generation import Generation, open_generation
from runtime.model.locator import Locator, pool
from runtime.model.manifest import Density, LocatorEntry, Score
from runtime.model.mixture import Router
from training.locator import low_rank_gaussian

WIDTH = 64


def random_locator(num_tasks: int, score: str) -> Locator:
    """A locator with random weights everywhere, whose thresholds some of its own features exceed."""
    generator = torch.Generator().manual_seed(num_tasks)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    frame = {"mean": random(WIDTH), "deviation": random(WIDTH).abs() + 0.5, "projection": random(WIDTH, 256) / 8}
    entries = []
    for task in range(num_tasks):
        vae = {name: random(*shape) / shape[-1] ** 0.5 for name, shape in vae_shapes().items()}
        entries.append((f"task-{task}", vae, LocatorEntry(digest="0" * 64, mean=0.8 + task, sd=0.3, threshold=1.0)))
    locator = Locator(frame, entries, score=score)
    locator.thresholds = locator.errors(noise(locator, 101)).median(0).values
    return locator


def noise(locator: Locator, size: int) -> torch.Tensor:
    features = torch.randn(size, locator.frame["mean"].shape[0], generator=torch.Generator().manual_seed(size))
    return locator.frame["mean"] + locator.frame["deviation"] * features


class Given(Densities):
    """Densities that nobody reads."""

    def __init__(self, locator: Locator) -> None:
        self._pair = (locator, locator)
        self.faults = {}

    def locators(self) -> tuple[Locator, Locator]:
        return self._pair


def with_locator(generation: Generation, locator: Locator) -> Generation:
    reference = generation.manifest.locator.model_copy(update={"score": locator.score})
    manifest = generation.manifest.model_copy(update={"locator": reference})
    return dataclasses.replace(generation, manifest=manifest, densities=Given(locator))


@pytest.fixture
def generation(three_tasks: Workshop) -> Generation:
    """Generation 3 with random densities; the first expert set has no expert in layer 3."""
    opened = with_locator(open_generation(three_tasks.repertoire), random_locator(3, "z"))
    first, *others = opened.manifest.experts
    manifest = opened.manifest.model_copy(
        update={"experts": (first.model_copy(update={"units": first.units[:1]}), *others)}
    )
    mixtures = {}
    for name, mixture in opened.mixtures.items():
        routers = dict(mixture.routers)
        kept = Router(routers[3].weight[1:], routers[3].experts[1:])
        routers[3] = kept
        if not kept.experts:
            del routers[3]
        mixtures[name] = dataclasses.replace(mixture, routers=routers)
    return dataclasses.replace(opened, manifest=manifest, mixtures=mixtures)


# ---- onnx-locator


def gaussian_locator(
    num_tasks: int, density: Density, score: Score, *, contrast: bool = False, in_parts: bool = False
) -> Locator:
    frame = random_locator(1, "raw").frame
    if in_parts:
        tripled = {name: frame[name].repeat(3) for name in ("mean", "deviation")}
        frame = {**tripled, "projection": torch.stack([frame["projection"].roll(i, 1) for i in range(3)])}
    width = 768 if in_parts else 256
    entries = []
    for task in range(num_tasks):
        rows = torch.randn(60, width, generator=torch.Generator().manual_seed(task)) + task / 4
        tensors = low_rank_gaussian(rows) if density == "low_rank" else {"mean": rows.mean(0)}
        entries.append((f"task-{task}", tensors, LocatorEntry(digest="0" * 64, mean=0.8, sd=0.3, threshold=1.0)))
    generator = torch.Generator().manual_seed(99)
    shapes = background_shapes(width).items()
    background = {name: torch.rand(shape, generator=generator) + 0.5 for name, shape in shapes} if contrast else None
    locator = Locator(frame, entries, score=score, density=density, background=background, unit_length=contrast)
    locator.thresholds = locator.errors(noise(locator, 101)).median(0).values
    return locator


@pytest.mark.parametrize("in_parts", [False, True], ids=["whole", "in parts"])
@pytest.mark.parametrize("contrast", [False, True], ids=["alone", "against a background"])
@pytest.mark.parametrize("density", ["gaussian", "low_rank"])
@pytest.mark.parametrize(("num_tasks", "score"), [(1, "raw"), (4, "raw"), (4, "z")])
def test_the_locator_graph_of_gaussians_says_what_the_locator_says(
    generation: Generation,
    tmp_path: Path,
    density: Density,
    num_tasks: int,
    score: Score,
    *,
    contrast: bool,
    in_parts: bool,
) -> None:
    locator = gaussian_locator(num_tasks, density, score, contrast=contrast, in_parts=in_parts)
    write_locator(with_locator(generation, locator), tmp_path, quiet)
    features = noise(locator, 20)
    got = run(tmp_path / "locator.onnx", features=features)
    errors = locator.errors(features)
    torch.testing.assert_close(got["errors"], errors, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got["scores"], locator.scores(errors), rtol=1e-4, atol=1e-3)
    names = [locator.tasks[index] if index >= 0 else None for index in got["task"].tolist()]
    assert names == [decision.task for decision in locator.locate(features)]
    assert len(set(names)) > 1


def test_a_score_that_needs_more_than_errors_is_not_exported(generation: Generation, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="score='neg_elbo': this target can export raw, z and abs_z"):
        write_locator(with_locator(generation, random_locator(2, "neg_elbo")), tmp_path, quiet)


@pytest.mark.parametrize("score", ["raw", "z", "abs_z"])
@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_the_locator_graph_says_what_the_locator_says_on_any_number_of_prompts(
    generation: Generation, tmp_path: Path, num_tasks: int, score: str
) -> None:
    locator = random_locator(num_tasks, score)
    write_locator(with_locator(generation, locator), tmp_path, quiet)
    chosen = set()
    for size in (1, 3, 33):
        features = noise(locator, size)
        got = run(tmp_path / "locator.onnx", features=features)
        errors = locator.errors(features)
        torch.testing.assert_close(got["errors"], errors, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got["scores"], locator.scores(errors), rtol=1e-5, atol=1e-4)
        decisions = locator.locate(features)
        names = [locator.tasks[index] if index >= 0 else None for index in got["task"].tolist()]
        assert names == [decision.task for decision in decisions]
        margins = torch.tensor([decision.margin for decision in decisions])
        torch.testing.assert_close(got["margin"], margins, rtol=1e-5, atol=1e-4)
        chosen |= set(names)
    assert len(chosen) > 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_feature_that_is_not_finite_is_of_no_task(generation: Generation, tmp_path: Path, value: float) -> None:
    write_locator(generation, tmp_path, quiet)
    features = torch.zeros(2, WIDTH)
    features[0, 5] = value
    assert generation.locator.locate(features)[0].task is None
    assert run(tmp_path / "locator.onnx", features=features)["task"][0] == -1


def test_the_verifying_features_reach_every_task_and_none() -> None:
    points, entries = torch.eye(3, 256) * 16, []
    for task, point in enumerate(points):
        vae = {name: torch.zeros(shape) for name, shape in vae_shapes().items()}
        calibration = LocatorEntry(digest="0" * 64, mean=0.0, sd=1.0, threshold=0.1)
        entries.append((f"task-{task}", {**vae, "output.bias": point}, calibration))
    frame = {"mean": torch.ones(WIDTH), "deviation": torch.ones(WIDTH) * 2, "projection": torch.eye(WIDTH, 256)}
    locator = Locator(frame, entries, score="raw")
    tasks = [index for case in locator_cases(locator) for index in case.outputs["task"].value.tolist()]
    assert set(tasks) == {-1, 0, 1, 2}


def test_a_generation_without_tasks_has_no_locator_to_export(generation: Generation, tmp_path: Path) -> None:
    empty = with_locator(generation, Locator(generation.locator.frame, [], score="raw"))
    with pytest.raises(InvalidInputError, match="generation=3: it holds no task"):
        write_locator(empty, tmp_path, quiet)


def test_real_prompts_are_located_by_the_exported_file(three_tasks: Workshop, prototypes: dict[str, str]) -> None:
    done = export(three_tasks.repertoire, "onnx-locator")
    features = torch.stack([pool(three_tasks.residual(text)) for text in prototypes.values()])
    got = run(done.folder / "locator.onnx", features=features)
    assert [done.manifest.files[0].facts["tasks"][index] for index in got["task"]] == list(prototypes)


# ---- onnx-router


@pytest.mark.parametrize("num_tokens", [1, 3, 65])
def test_a_router_graph_gives_the_weights_of_top_k_in_the_columns_of_the_visible_set(
    generation: Generation, tmp_path: Path, num_tokens: int
) -> None:
    write_routers(generation, tmp_path, quiet)
    x = torch.randn(num_tokens, WIDTH, generator=torch.Generator().manual_seed(num_tokens))
    for task, mixture in generation.mixtures.items():
        visible = generation.manifest.task(task).router.visible
        for layer, router in mixture.routers.items():
            logits = x @ router.weight.t()
            k = torch.full((num_tokens,), mixture.top_k)
            expected = top_k_weights(logits, torch.ones_like(logits, dtype=torch.bool), k, mixture.top_k)
            got = run(tmp_path / f"{task}.onnx", x=x, layer=torch.tensor(layer))["weights"]
            here = [visible.index(digest) for digest in router.experts]
            absent = [column for column in range(len(visible)) if column not in here]
            torch.testing.assert_close(got[:, here], expected, rtol=1e-5, atol=1e-5)
            assert (got[:, here] > 0).eq(expected > 0).all()
            assert (got[:, absent] == 0).all()


@pytest.mark.parametrize("layer", [0, 1, 4, 99, -1, -2])
def test_a_layer_without_a_router_gives_zeros(generation: Generation, tmp_path: Path, layer: int) -> None:
    write_routers(generation, tmp_path, quiet)
    weights = run(tmp_path / "blue.onnx", x=torch.randn(3, WIDTH), layer=torch.tensor(layer))["weights"]
    assert torch.equal(weights, torch.zeros(3, 3))


def test_a_layer_that_one_task_lacks_gives_zeros_for_that_task_alone(generation: Generation, tmp_path: Path) -> None:
    write_routers(generation, tmp_path, quiet)
    x, layer = torch.randn(3, WIDTH), torch.tensor(3)
    assert torch.equal(run(tmp_path / "red.onnx", x=x, layer=layer)["weights"], torch.zeros(3, 1))
    assert torch.equal(run(tmp_path / "green.onnx", x=x, layer=layer)["weights"][:, 1], torch.ones(3))


def test_routers_that_cannot_tell_their_experts_apart_are_not_called_verified(
    generation: Generation, tmp_path: Path
) -> None:
    blue = generation.mixtures["blue"]
    routers = {2: Router(torch.ones(3, WIDTH), blue.routers[2].experts), 3: blue.routers[3]}
    mixtures = {"blue": dataclasses.replace(blue, routers=routers)}
    with pytest.raises(ExportMismatchError, match=r"blue\.onnx: output weights: no row could be compared"):
        write_routers(dataclasses.replace(generation, mixtures=mixtures), tmp_path, quiet)


# ---- verification


@pytest.mark.parametrize(
    "constant",
    [
        *("frame_mean", "frame_deviation", "frame_projection", "error_mean", "error_sd", "threshold"),
        *(f"{linear}_{part}" for linear in ("encode", "mu", "decode", "output") for part in ("weight", "bias")),
    ],
)
def test_any_changed_constant_of_the_locator_fails_verification(
    generation: Generation, tmp_path: Path, constant: str
) -> None:
    write_locator(generation, tmp_path, quiet)
    path = tmp_path / "locator.onnx"
    verify(path, locator_cases(generation.locator))
    change_constant(path, constant)
    with pytest.raises(ExportMismatchError, match=r"locator\.onnx: output \w+ differs .* error .*, tolerance "):
        verify(path, locator_cases(generation.locator))


@pytest.mark.parametrize("constant", ["layers", "slots", "router_weights", "has_experts"])
def test_any_changed_constant_of_a_router_fails_verification(
    generation: Generation, tmp_path: Path, constant: str
) -> None:
    write_routers(generation, tmp_path, quiet)
    path, columns = tmp_path / "blue.onnx", router_columns(generation.manifest, "blue")
    verify(path, router_cases(generation.mixtures["blue"], columns, 3))
    change_constant(path, constant)
    with pytest.raises(ExportMismatchError, match=r"blue\.onnx: "):
        verify(path, router_cases(generation.mixtures["blue"], columns, 3))


def test_another_shape_dtype_or_set_of_outputs_fails_verification(generation: Generation, tmp_path: Path) -> None:
    write_locator(generation, tmp_path, quiet)
    path = tmp_path / "locator.onnx"
    (largest,) = (case for case in locator_cases(generation.locator) if case.size == SIZES[-1])
    outputs = dict(largest.outputs)

    def check(case: Case, message: str) -> None:
        with pytest.raises(ExportMismatchError, match=message):
            verify(path, [case])

    shorter = {**outputs, "margin": Wanted(outputs["margin"].value[:-1])}
    check(dataclasses.replace(largest, outputs=shorter), r"margin is float32 \(64,\), torch has float32 \(63,\)")
    other = {**outputs, "task": Wanted(outputs["task"].value.int())}
    check(dataclasses.replace(largest, outputs=other), "task is int64 .*, torch has int32")
    check(dataclasses.replace(largest, outputs={"errors": outputs["errors"]}), "outputs are")
    wide = {"features": torch.zeros(SIZES[-1], WIDTH + 1)}
    check(dataclasses.replace(largest, inputs=wide), "onnxruntime fails on 64 rows")
    nan = {**outputs, "margin": Wanted(torch.full((SIZES[-1],), torch.nan))}
    check(dataclasses.replace(largest, outputs=nan), "largest error nan")


def test_a_file_that_is_no_model_fails_verification(tmp_path: Path) -> None:
    (tmp_path / "locator.onnx").write_bytes(b"no model")
    with pytest.raises(ExportMismatchError, match=r"locator\.onnx: onnxruntime does not take it"):
        verify(tmp_path / "locator.onnx", [])


def test_the_order_in_which_constants_come_does_not_change_a_file(generation: Generation, tmp_path: Path) -> None:
    (first,) = write_locator(generation, tmp_path, quiet)
    turned = generation.locator
    turned.frame = dict(reversed(turned.frame.items()))
    (second,) = write_locator(generation, tmp_path, quiet)
    assert second.sha256 == first.sha256
