"""What a user may choose about training: one frozen value, checked when it is made.

It does not know torch, models or data, so that the command line can show its defaults without loading any of them.
Read first: every default is written here and nowhere else.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

from runtime.errors import InvalidInputError

Dtype = Literal["auto", "float32", "bfloat16"]
StoreDtype = Literal["float32", "bfloat16", "float16"]
LocatorScore = Literal["raw", "z", "abs_z", "neg_elbo"]
LocatorDensity = Literal["low_rank", "gaussian", "vae"]
Expansion = Literal["everywhere", "paper", "calibrated"]
ExpansionAxis = Literal["layers", "experts"]
ExpertStart = Literal["copy", "fresh"]
Visible = Literal["all", "own"]

_FEATURE = re.compile(r"embedding|layer:\d{1,4}|last|parts")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How one task is trained; all tasks of a repertoire may differ in everything but `first_layer`.

    Args:
        rank: R of every new expert.
        alpha: the update is scaled by alpha / R.
        top_k: experts per token and layer, K; fewer where fewer are visible.
        visible: experts that the task's router may choose: "all" that are there when it arrives, or only its "own".
        first_layer: lowest layer with experts; None takes what the repertoire has, or a third of the depth for a new
            one (ours; the layers below are base only, so all tasks share them and the locator reads there).
        learning_rate: peak rate of the experts.
        router_learning_rate: peak rate of the routers.
        weight_decay: of AdamW.
        epochs: passes over the examples.
        max_steps: upper bound on optimiser steps; None leaves it to `epochs`.
        batch_size: examples per step, B.
        accumulation: pieces in which a step's examples are computed; more pieces take less memory, not more steps.
        warmup_share: share of the steps in which the rate rises linearly; it falls as a cosine afterwards.
        gradient_clip: bound on the norm of all gradients together.
        balance_coefficient: lambda of the load-balancing loss.
        patience: looks at held-out loss without a gain after which training stops, with the best it had; None trains to
            the end and holds nothing out.
        evaluate_every: steps between two looks.
        held_out: share of the examples that are looked at and never train.
        checkpoint_every: steps between two checkpoints, where a folder for them is given.
        expansion: which layers of a task after the first get an expert: every one, or those that probing asks for; see
            `training.expansion`.
        expansion_axis: of "paper": what mean and deviation run over.
        expansion_alpha: of "paper": a layer is expanded above mean - alpha * deviation; below 0: fewer (ours).
        expansion_tolerance: of "calibrated": nats per answer token that masking a layer's probe may cost.
        probe_share: share of the examples that probing uses, half to train the probes and half to measure them (10 %:
            paper, the halves: ours).
        probe_steps: optimiser steps of the probes.
        expert_start: after probing, a new expert begins as a copy of the layer's most-used old expert (paper) or fresh.
        hyper_bottleneck: width inside the hyper-adapters beside the experts, b (HyperMoE); None trains none.
        hyper_factor: rank of the matrices that the hypernetwork's heads write.
        max_tokens: longest prompt plus answer; a longer example is an error, never cut.
        seed: of everything random; one seed on one machine gives one result.
        dtype: of the frozen base in training; "auto" is bfloat16 where the hardware multiplies it fast.
        store_dtype: of the experts on disk.
        locator_steps: optimiser steps of a task's VAE, each over all of its training features.
        locator_learning_rate: peak rate of the VAE.
        locator_beta: weight of the KL term.
        locator_held_out: share of the examples that calibrate a VAE and never train it; Gaussians need none.
        locator_score: how a new repertoire compares tasks; see `runtime.model.locator.Locator`.
        locator_density: what a new repertoire fits to each task's prompts: a Gaussian with a covariance of its own
            ("low_rank", ours) or with that of the reference prompts ("gaussian", ours), or a VAE (paper).
        locator_feature: what a new repertoire sees of prompts: "embedding", "layer:N" (mean over the prompt of what
            enters decoder layer N), "parts" (that of FIRST_LAYER, of its last tokens, and "embedding": ours) or "last"
            (the last token after the last layer: paper); None is "parts", with VAEs "layer:FIRST_LAYER".
        locator_false_abstain: share of a task's own prompts that its threshold may refuse; of a task that lies far from
            everything else it refuses fewer.

    Raises:
        InvalidInputError: a value is out of range; the message names field and value.
    """

    rank: int = 8
    alpha: float = 16.0
    top_k: int = 2
    visible: Visible = "all"
    first_layer: int | None = None
    learning_rate: float = 4e-3
    router_learning_rate: float = 2e-3
    weight_decay: float = 0.0
    epochs: int = 3
    max_steps: int | None = None
    batch_size: int = 8
    accumulation: int = 1
    warmup_share: float = 0.1
    gradient_clip: float = 1.0
    balance_coefficient: float = 0.01
    patience: int | None = None
    evaluate_every: int = 20
    held_out: float = 0.1
    checkpoint_every: int = 50
    expansion: Expansion = "everywhere"
    expansion_axis: ExpansionAxis = "layers"
    expansion_alpha: float = 0.0
    expansion_tolerance: float = 0.002
    probe_share: float = 0.1
    probe_steps: int = 40
    expert_start: ExpertStart = "copy"
    hyper_bottleneck: int | None = None
    hyper_factor: int = 4
    max_tokens: int = 512
    seed: int = 0
    dtype: Dtype = "auto"
    store_dtype: StoreDtype = "bfloat16"
    locator_steps: int = 800
    locator_learning_rate: float = 3e-3
    locator_beta: float = 0.3
    locator_held_out: float = 0.2
    locator_score: LocatorScore = "raw"
    locator_density: LocatorDensity = "low_rank"
    locator_feature: str | None = None
    locator_false_abstain: float = 0.055

    def __post_init__(self) -> None:
        for field in (
            "rank",
            "top_k",
            "epochs",
            "batch_size",
            "accumulation",
            "probe_steps",
            "max_tokens",
            "locator_steps",
        ):
            _check_whole(field, getattr(self, field), 1)
        _check_whole("seed", self.seed, 0)
        _check_whole("hyper_factor", self.hyper_factor, 1)
        if self.hyper_bottleneck is not None:
            _check_whole("hyper_bottleneck", self.hyper_bottleneck, 1)
        if self.first_layer is not None:
            _check_whole("first_layer", self.first_layer, 0)
        if self.max_steps is not None:
            _check_whole("max_steps", self.max_steps, 1)
        for field in ("alpha", "learning_rate", "router_learning_rate", "gradient_clip", "locator_learning_rate"):
            _check_real(field, getattr(self, field), "above 0")
        for field in ("weight_decay", "balance_coefficient", "locator_beta", "expansion_tolerance"):
            _check_real(field, getattr(self, field), "0 or more")
        _check_real("expansion_alpha", self.expansion_alpha)
        _check_share("warmup_share", self.warmup_share, zero=True)
        _check_share("locator_held_out", self.locator_held_out, zero=False)
        _check_share("locator_false_abstain", self.locator_false_abstain, zero=True)
        _check_share("held_out", self.held_out, zero=False)
        _check_share("probe_share", self.probe_share, zero=False)
        _check_choice("visible", self.visible, get_args(Visible))
        _check_choice("dtype", self.dtype, get_args(Dtype))
        _check_choice("store_dtype", self.store_dtype, get_args(StoreDtype))
        _check_choice("expansion", self.expansion, get_args(Expansion))
        _check_choice("expansion_axis", self.expansion_axis, get_args(ExpansionAxis))
        _check_choice("expert_start", self.expert_start, get_args(ExpertStart))
        _check_choice("locator_score", self.locator_score, get_args(LocatorScore))
        _check_choice("locator_density", self.locator_density, get_args(LocatorDensity))
        if self.locator_score == "neg_elbo" and self.locator_density != "vae":
            raise InvalidInputError("locator_score", self.locator_score, "only the density vae has an ELBO")
        if self.locator_feature is not None and not _FEATURE.fullmatch(self.locator_feature):
            raise InvalidInputError(
                "locator_feature", self.locator_feature, "must be embedding, layer:N, parts or last"
            )

    def num_steps(self, num_examples: int) -> int:
        """Optimiser steps over `num_examples` examples: whole passes, the last batch of a pass may be small."""
        steps = self.epochs * math.ceil(num_examples / self.batch_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)


def _check_whole(field: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidInputError(field, value, f"must be a whole number, {least} or more")


def _check_real(field: str, value: object, least: Literal["above 0", "0 or more"] | None = None) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or (least and value < 0) or (least == "above 0" and value == 0):  # type: ignore[operator]
        raise InvalidInputError(field, value, "must be a finite number" + (f", {least}" if least else ""))


def _check_share(field: str, value: object, *, zero: bool) -> None:
    if not isinstance(value, int | float) or not (0 <= value < 1) or (value == 0 and not zero):
        raise InvalidInputError(field, value, f"must be a share {'from' if zero else 'above'} 0 and below 1")


def _check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidInputError(field, value, f"must be one of {', '.join(choices)}")
