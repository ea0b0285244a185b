"""Target `onnx-locator`: projection, all tasks' VAEs and the decision, as one graph.

It does not know how features are read from the base model; `facts` name the feature and the layer it is read at.
Read first: the graph computes what `runtime.model.locator.Locator` computes for all tasks at once; of a VAE's encoder,
the half that only training needs is left out, so the score "neg_elbo", which needs it, cannot be exported.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from exporters.manifest import Facts, FileEntry
from exporters.onnx_graph import Progress, build_model, write_verified
from exporters.opsets import OPSET
from exporters.verify import SIZES, TOLERANCE, Case, Wanted
from runtime.errors import InvalidInputError
from runtime.model.density import LATENT, PROJECTED, decode
from runtime.model.generation import Generation
from runtime.model.locator import LEAST_LENGTH, Locator

FILE_NAME = "locator.onnx"

_LINEARS = ("encode", "mu", "decode", "output")

_PROJECT = """
    axis_middle = Constant<value_ints = [1]>()
    axis_features = Constant<value_ints = [2]>()
    centred = Sub(features, frame_mean)
    normalised = Div(centred, frame_deviation)
    projected = MatMul(normalised, frame_projection)
"""

_PROJECT_PARTS = """
    axis_middle = Constant<value_ints = [1]>()
    axis_features = Constant<value_ints = [2]>()
    centred = Sub(features, frame_mean)
    normalised = Div(centred, frame_deviation)
    parts_shape = Constant<value_ints = [0, %d, %d]>()
    row_parts = Reshape(normalised, parts_shape)
    parts = Transpose<perm = [1, 0, 2]>(row_parts)
    projected = MatMul(parts, frame_projection)
"""

_JOIN_PARTS = """
    joined_shape = Constant<value_ints = [0, %d]>()
    rows_projected = Transpose<perm = [1, 0, 2]>(parts_projected)
    projected = Reshape(rows_projected, joined_shape)
"""

_UNIT_LENGTH = f"""
    axis_dimensions = Constant<value_ints = [-1]>()
    least_length = Constant<value_float = {LEAST_LENGTH}>()
    wanted_length = Constant<value_float = {PROJECTED**0.5}>()
    free_squares = Mul(free, free)
    free_sum = ReduceSum(free_squares, axis_dimensions)
    free_root = Sqrt(free_sum)
    free_length = Max(free_root, least_length)
    stretch = Div(wanted_length, free_length)
    projected = Mul(free, stretch)
"""

_ERRORS = {
    "vae": """
    encode_product = MatMul(projected, encode_weight)
    encode_sum = Add(encode_product, encode_bias)
    encoded = Relu(encode_sum)
    mu_product = MatMul(encoded, mu_weight)
    latent = Add(mu_product, mu_bias)
    decode_product = MatMul(latent, decode_weight)
    decode_sum = Add(decode_product, decode_bias)
    decoded = Relu(decode_sum)
    output_product = MatMul(decoded, output_weight)
    reconstruction = Add(output_product, output_bias)
    difference = Sub(projected, reconstruction)
    square = Mul(difference, difference)
    errors_by_task = ReduceMean<keepdims = 0>(square, axis_features)
    errors = Transpose<perm = [1, 0]>(errors_by_task)
""",
    "gaussian": """
    centres = Unsqueeze(projected, axis_middle)
    difference = Sub(centres, mean)
    square = Mul(difference, difference)
    errors = ReduceMean<keepdims = 0>(square, axis_features)
""",
    "low_rank": """
    centres = Unsqueeze(projected, axis_middle)
    difference = Sub(centres, mean)
    square = Mul(difference, difference)
    length = ReduceSum<keepdims = 0>(square, axis_features)
    distance = Mul(length, precision)
    by_task = Transpose<perm = [1, 0, 2]>(difference)
    along = MatMul(by_task, directions)
    along_square = Mul(along, along)
    gained = Mul(along_square, gains)
    inside_by_task = ReduceSum<keepdims = 0>(gained, axis_features)
    inside = Transpose<perm = [1, 0]>(inside_by_task)
    shape = Sub(distance, inside)
    surprise = Add(shape, volume)
    errors = Div(surprise, num_features)
""",
}

_BACKGROUND = """
    background_offset = Sub(projected, background_mean)
    background_square = Mul(background_offset, background_offset)
    background_length = MatMul(background_square, background_precision)
    background_sum = Add(background_length, background_volume)
    background_error = Div(background_sum, num_features)
    errors = Sub(task_errors, background_error)
"""

_SCORES = {
    "raw": """
    scores = Identity(errors)
""",
    "z": """
    excess = Sub(errors, error_mean)
    scores = Div(excess, error_sd)
""",
    "abs_z": """
    excess = Sub(errors, error_mean)
    z = Div(excess, error_sd)
    scores = Abs(z)
""",
}

_MARGIN = {
    "no rival": """
    column_shape = Shape(task)
    margin = ConstantOfShape<value = float[1] {0.0}>(column_shape)
""",
    "rivals": """
    best_score, next_score = Split<axis = 1, num_outputs = 2>(best_scores)
    lead = Sub(next_score, best_score)
    margin = Squeeze(lead, axis_tasks)
""",
}

_DECISION = """
    num_best = Constant<value_ints = [%d]>()
    best_scores, best_tasks = TopK<axis = 1, largest = 0>(scores, num_best)
    first = Constant<value_ints = [0]>()
    second = Constant<value_ints = [1]>()
    axis_tasks = Constant<value_ints = [1]>()
    best_task = Slice(best_tasks, first, second, axis_tasks)
    best_error = GatherElements<axis = 1>(errors, best_task)
    best_threshold = Gather(threshold, best_task)
    near = LessOrEqual(best_error, best_threshold)
    none = Constant<value_ints = [-1]>()
    task_or_none = Where(near, best_task, none)
    task = Squeeze(task_or_none, axis_tasks)
"""


def write_locator(
    generation: Generation, folder: Path, on_progress: Progress, *, opset: int = OPSET
) -> tuple[FileEntry, ...]:
    """Write `locator.onnx` into `folder`, verified.

    Raises:
        InvalidInputError: the generation holds no task, or its tasks are compared by "neg_elbo".
        ExportMismatchError: see `exporters.verify`.
    """
    locator, reference = generation.locator, generation.manifest.locator
    if not locator.tasks:
        raise InvalidInputError("generation", generation.manifest.generation, "it holds no task that could be located")
    if locator.score == "neg_elbo":
        raise InvalidInputError("score", locator.score, "this target can export raw, z and abs_z")
    facts: Facts = {
        "tasks": list(locator.tasks),
        "score": reference.score,
        "feature": reference.feature,
        "layer": reference.layer,
    }
    model = build_model(_graph(locator), _tensors(locator), facts, opset=opset)
    return (write_verified(folder / FILE_NAME, model, facts, locator_cases(locator), on_progress),)


def _graph(locator: Locator) -> str:
    width, num_tasks = locator.frame["mean"].shape[0], len(locator.tasks)
    outputs = f"float[B, {num_tasks}] errors, float[B, {num_tasks}] scores, int64[B] task, float[B] margin"
    decision = _DECISION % min(2, num_tasks)
    margin = _MARGIN["rivals" if num_tasks > 1 else "no rival"]
    errors = _ERRORS[locator.density]
    if locator.background is not None:
        errors = errors.replace("    errors = ", "    task_errors = ") + _BACKGROUND
    projection = locator.frame["projection"]
    in_parts = projection.dim() == 3
    seen = _PROJECT_PARTS % projection.shape[:2] if in_parts else _PROJECT
    if locator.unit_length:
        seen = seen.replace("    projected = ", "    free = ") + _UNIT_LENGTH
    if in_parts:
        seen = seen.replace("    projected = ", "    parts_projected = ") + _JOIN_PARTS % locator.width
    seen += f"    num_features = Constant<value_float = {float(locator.width)}>()\n"
    body = seen + errors + _SCORES[locator.score] + decision + margin
    return f"locator (float[B, {width}] features) => ({outputs}) {{{body}}}"


def _tensors(locator: Locator) -> dict[str, torch.Tensor]:
    tensors = {f"frame_{name}": tensor for name, tensor in locator.frame.items()}
    tensors |= _density_tensors(locator)
    if locator.background is not None:
        tensors |= {f"background_{name}": tensor for name, tensor in locator.background.items()}
        tensors["background_precision"] = locator.background["precision"].unsqueeze(1)  # [P, 1]
    tensors["threshold"] = locator.thresholds
    if locator.score != "raw":
        tensors |= {"error_mean": locator.means, "error_sd": locator.deviations}
    return tensors


def _density_tensors(locator: Locator) -> dict[str, torch.Tensor]:
    stacked = locator.stacked
    if locator.density != "vae":
        tensors = {"mean": locator.prototypes.unsqueeze(0)}  # [1, N, P]
        if locator.density == "low_rank":
            tensors |= {name: stacked[name][:, 0].contiguous() for name in ("precision", "volume")}  # [N]
            tensors["directions"] = stacked["directions"].transpose(1, 2).contiguous()  # [N, P, R]
            tensors["gains"] = stacked["gains"].unsqueeze(1).contiguous()  # [N, 1, R]
        return tensors
    tensors = {}
    for name in _LINEARS:
        tensors[f"{name}_weight"] = stacked[f"{name}.weight"].transpose(1, 2).contiguous()  # [N, in, out]
        tensors[f"{name}_bias"] = stacked[f"{name}.bias"].unsqueeze(1).contiguous()  # [N, 1, out]
    return tensors


def locator_cases(locator: Locator) -> Iterator[Case]:
    """Seeded features of every size in `SIZES`, with what torch makes of them."""
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        features = _features(locator, size, generator)
        errors = locator.errors(features)
        scores = locator.scores(errors)
        energy = locator.project(features).square().mean(1, keepdim=True)
        error_scale = torch.maximum(errors.abs(), energy)  # [B, N]
        score_scale = error_scale
        if locator.score != "raw":
            score_scale = (error_scale + locator.means.abs()) / locator.deviations
        margin_scale = score_scale.max(1).values
        decisions = locator.locate(features)
        margin = torch.tensor([decision.margin for decision in decisions])
        best = scores.argmin(1)
        distance = (errors[torch.arange(size), best] - locator.thresholds[best]).abs()
        settled = distance > TOLERANCE * error_scale.max(1).values.clamp(min=1)
        if len(locator.tasks) > 1:
            settled &= margin > TOLERANCE * margin_scale.clamp(min=1)
        index = [-1 if decision.task is None else locator.tasks.index(decision.task) for decision in decisions]
        yield Case(
            size=size,
            inputs={"features": features},
            outputs={
                "errors": Wanted(errors, scale=error_scale),
                "scores": Wanted(scores, scale=score_scale),
                "task": Wanted(torch.tensor(index), settled=settled),
                "margin": Wanted(margin, scale=margin_scale),
            },
        )


def _features(locator: Locator, size: int, generator: torch.Generator) -> torch.Tensor:
    """[B, D]: every third row is noise of the frame's mean and deviation, the others are what a task may look like.

    That is what its VAE decodes, or its mean with a little noise.
    """
    mean, deviation, projection = (locator.frame[name] for name in ("mean", "deviation", "projection"))
    rows = torch.arange(size)
    noise = torch.randn(size, mean.shape[0], generator=generator)
    tasks = (rows - rows // 3) % len(locator.tasks)  # in turn over the rows that are not noise
    if locator.density == "vae":
        latent = torch.randn(len(locator.tasks), size, LATENT, generator=generator)
        decoded = decode(locator.stacked, latent)[tasks, rows]  # [B, 256]
    else:
        decoded = locator.prototypes[tasks] + 0.1 * torch.randn(size, locator.width, generator=generator)
    inverse = torch.linalg.pinv(projection)  # [256, D], of parts [3, 256, D]
    if inverse.dim() == 3:
        near = torch.einsum("bpe,ped->bpd", decoded.view(size, -1, PROJECTED), inverse).flatten(1)
    else:
        near = decoded @ inverse
    normalised = torch.where((rows % 3 == 2).unsqueeze(1), noise, near)
    return mean + deviation * normalised
