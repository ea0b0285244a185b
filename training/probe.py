"""Probe-Guided Knowledge Extension (LLaVA-CMoE, arXiv 2503.21227): measures where a new task wants its own expert.

It does not know what is done with the answer (`training.expansion` decides, `training.task` trains).
Read first: probes are trained on a small part of the data and thrown away; old experts are frozen throughout. The
balancing loss is on while probes train and off while they are measured, on rows that did not train them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from runtime.errors import InvalidInputError
from runtime.model.attach import MixtureFFN, attached
from runtime.model.base import BaseModel
from runtime.model.expert import Expert
from training.batches import Row
from training.config import TrainingConfig
from training.expansion import LayerUse
from training.held_out import held_out_loss
from training.mixtures import fresh_experts, new_mixture
from training.quick_attention import quick_attention
from training.seeds import seed_for
from training.steps import Steps


@dataclass(frozen=True)
class ProbeSplit:
    """The rows that probing uses; none is in both parts."""

    train: tuple[Row, ...]
    measure: tuple[Row, ...]


@dataclass(frozen=True)
class Probing:
    """What probing found.

    Args:
        layers: layer -> use.
        held_out_loss: with all probes, nats per answer token.
        num_train: rows that trained the probes.
        num_measure: rows that they were measured on.
    """

    layers: Mapping[int, LayerUse]
    held_out_loss: float
    num_train: int
    num_measure: int


def split_probe_rows(rows: Sequence[Row], *, share: float, seed: int) -> ProbeSplit:
    """Draw `share` of the rows, at least two, and halve them.

    Raises:
        InvalidInputError: fewer than two rows.
    """
    if len(rows) < 2:
        raise InvalidInputError("examples", len(rows), "probing needs 2 or more")
    num = max(2, round(share * len(rows)))
    drawn = random.Random(seed).sample(list(rows), num)  # noqa: S311 - a draw of examples is no secret
    return ProbeSplit(tuple(drawn[: (num + 1) // 2]), tuple(drawn[(num + 1) // 2 :]))


def probe(
    base: BaseModel,
    rows: Sequence[Row],
    older: Sequence[Mapping[int, Expert]],
    *,
    name: str,
    first_layer: int,
    config: TrainingConfig,
    masks: bool,
) -> Probing:
    """Attach a probe and a fresh router over old experts + probe in every layer, train both, measure, drop them.

    Args:
        base: frozen; as before afterwards.
        rows: all examples of the task; `probe_share` of them are used.
        older: the visible expert sets, each layer -> expert.
        name: of the task; enters the seeds.
        first_layer: lowest layer that may get an expert.
        config: the fields `probe_*`, rates and sizes.
        masks: also measure the loss with each layer's probe masked.
    """
    split = split_probe_rows(rows, share=config.probe_share, seed=seed_for(config.seed, name, "probe split"))
    probes = fresh_experts(base, range(first_layer, base.info.num_layers), config, seed_name=f"{name}/probe")
    ffns = new_mixture(base, older, probes, name=f"{name}/probe", first_layer=first_layer, config=config)
    steps = Steps(
        base,
        ffns,
        split.train,
        name=name,
        config=replace(config, batch_size=min(config.batch_size, len(split.train))),
        num_steps=config.probe_steps,
        order_seed=seed_for(config.seed, name, "probe order"),
    )
    with quick_attention(base):
        with attached(base.model, ffns):
            while steps.done < steps.num_steps:
                steps.step()
        loss, frequencies = held_out_loss(base, ffns, split.measure, batch_size=config.batch_size)
        layers = {}
        for layer in ffns:
            rise = None
            if masks:
                masked = _without_probe(ffns, layer)
                rise = held_out_loss(base, masked, split.measure, batch_size=config.batch_size)[0] - loss
            members = tuple(i for i, experts in enumerate(older) if layer in experts)
            layers[layer] = LayerUse(members, tuple(frequencies[layer].tolist()), rise)
    return Probing(layers, loss, len(split.train), len(split.measure))


def _without_probe(ffns: Mapping[int, MixtureFFN], layer: int) -> dict[int, MixtureFFN]:
    """The same mixtures with the last expert of one layer masked: its weight goes to the others, or to nobody."""
    kept = dict(ffns)
    ffn = kept.pop(layer)
    others = list(ffn.experts)[:-1]
    if others:
        kept[layer] = MixtureFFN(
            ffn.ffn,
            others,  # type: ignore[arg-type]
            nn.Parameter(ffn.router.detach()[:-1], requires_grad=False),
            top_k=min(ffn.top_k, len(others)),
        )
    return kept
