"""Sights: the ways in which a locator looks at prompts, and a task's density seen so.

It does not know experts, routers or how a repertoire is written.
Read first: a repertoire has two sights, made once for good: `locator` decides, and `arrival` guesses from the token
embeddings before the model has run. A task's density sees that task's prompts alone, so nothing older moves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import save

from runtime.errors import InvalidInputError
from runtime.model.base import BaseModel
from runtime.model.density import background_shapes, density_shapes
from runtime.model.locator import frame_shapes, num_parts, projected_width
from runtime.model.manifest import Density, Feature, LocatorEntry, LocatorRef
from runtime.model.prompt import PromptTemplate
from runtime.model.repertoire import Repertoire
from training.config import TrainingConfig
from training.features import features
from training.locator import Calibration, fit_entry, make_background, make_frame
from training.reference_prompts import reference_kinds, reference_prompts
from training.seeds import seed_for

Tensors = dict[str, torch.Tensor]

_FAR = 1e4


@dataclass(frozen=True)
class Sight:
    """One way to look at prompts: what the manifest says of it, its tensors, and the reference prompts seen so."""

    ref: LocatorRef
    frame: Tensors
    background: Tensors | None
    reference: torch.Tensor  # [M, D]

    def blobs(self) -> tuple[bytes, ...]:
        """Those that `ref` names."""
        return tuple(save(tensors) for tensors in (self.frame, self.background) if tensors is not None)


@dataclass(frozen=True)
class SeenTask:
    """A task's density: its entry, the blobs that the entry names, and how many numbers were fitted."""

    entry: LocatorEntry
    blobs: tuple[bytes, ...]
    num_parameters: int


def feature_layer(feature: str | None, *, density: Density, first_layer: int, num_layers: int) -> tuple[Feature, int]:
    """What a configuration's `locator_feature` means in a manifest: feature and layer.

    Raises:
        InvalidInputError: the base has no such layer; or parts for a VAE, or where no layer lies below the experts.
    """
    can_part = density != "vae" and first_layer > 0
    if feature == "parts" and not can_part:
        raise InvalidInputError("locator_feature", feature, "needs a Gaussian density and a first_layer above 0")
    if feature == "parts" or (feature is None and can_part):
        return "residual_parts", first_layer
    if feature is None:
        return "residual_mean", first_layer
    if feature == "last":
        return "residual_last", num_layers
    layer = 0 if feature == "embedding" else int(feature.removeprefix("layer:"))
    if layer >= num_layers:
        raise InvalidInputError("locator_feature", feature, f"the base has {num_layers} layers")
    return "residual_mean", layer


def new_sight(base: BaseModel, template: PromptTemplate, feature: tuple[Feature, int], config: TrainingConfig) -> Sight:
    """A sight for a new repertoire."""
    kind, layer = feature
    reference = _reference_features(base, template, layer, kind)
    seed = seed_for(config.seed, "frame", str(layer))
    frame = make_frame(
        reference,
        seed=seed,
        density=config.locator_density,
        kinds=reference_kinds(),
        num_parts=num_parts(kind),
    )
    gaussian = config.locator_density != "vae"
    background = make_background(frame, reference, unit_length=True) if gaussian else None
    ref = LocatorRef(
        frame=sha256(save(frame)),
        feature=kind,
        layer=layer,
        score=config.locator_score,
        density=config.locator_density,
        beta=config.locator_beta,
        background=sha256(save(background)) if background is not None else None,
        unit_length=gaussian,
    )
    return Sight(ref, frame, background, reference)


def sight_of(repertoire: Repertoire, base: BaseModel, template: PromptTemplate, ref: LocatorRef) -> Sight:
    """A sight that a repertoire has."""
    frame = repertoire.read_tensors(ref.frame, frame_shapes(base.info.width, ref.feature))
    shapes = background_shapes(projected_width(ref.feature))
    background = repertoire.read_tensors(ref.background, shapes) if ref.background else None
    reference = _reference_features(base, template, ref.layer, ref.feature)
    return Sight(ref, frame, background, reference)


def see_task(
    base: BaseModel, prompts: Sequence[Sequence[int]], sight: Sight, config: TrainingConfig, name: str
) -> SeenTask:
    """Fit and calibrate a task's density; see `training.locator.fit_entry`. Without prompts nothing is ever located."""
    ref = sight.ref
    if not prompts:
        return _unlocatable(ref)
    own = features(base, prompts, ref.layer, kind=ref.feature)
    seed = seed_for(config.seed, name, "density", str(ref.layer))
    fitted = fit_entry(
        sight.frame,
        own,
        sight.reference,
        config,
        density=ref.density,
        seed=seed,
        background=sight.background,
        unit_length=ref.unit_length,
    )
    return _entry(ref, fitted.tensors, fitted.prototype, fitted.calibration)


def _entry(ref: LocatorRef, tensors: Tensors, prototype: torch.Tensor, calibration: Calibration) -> SeenTask:
    blobs = [save(tensors)]
    if ref.density == "vae":
        blobs.append(save({"mean": prototype}))
    entry = LocatorEntry(
        digest=sha256(blobs[0]),
        mean=calibration.mean,
        sd=calibration.sd,
        threshold=calibration.threshold,
        prototype=sha256(blobs[1]) if ref.density == "vae" else None,
    )
    return SeenTask(entry, tuple(blobs), sum(tensor.numel() for tensor in tensors.values()))


def _unlocatable(ref: LocatorRef) -> SeenTask:
    """A density that is far from every prompt, and refuses it besides: its task is only ever pinned."""
    width = projected_width(ref.feature)
    tensors = {name: torch.zeros(shape) for name, shape in density_shapes(ref.density, width).items()}
    prototype = torch.full((width,), _FAR)
    tensors["output.bias" if ref.density == "vae" else "mean"] = prototype
    if ref.density == "low_rank":
        tensors["precision"] = torch.ones(1)
    return _entry(ref, tensors, prototype, Calibration(mean=0.0, sd=1.0, threshold=-1.0))


def sha256(blob: bytes) -> str:
    """The name of a blob."""
    return hashlib.sha256(blob).hexdigest()


def _reference_features(base: BaseModel, template: PromptTemplate, layer: int, kind: Feature) -> torch.Tensor:
    prompts = [template.encode(base.tokenizer, text) for text in reference_prompts()]
    return features(base, prompts, layer, kind=kind)
