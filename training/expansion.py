"""Where a new task gets an expert: expansion policies over what probing measured.

It does not know tensors, models or how anything was measured (`training.probe`).
Read first: `Everywhere` needs no probing. `Paper` is LLaVA-CMoE's rule (arXiv 2503.21227); over layers with alpha > 0
it can never answer "add nothing", which is why `Calibrated` (ours) asks what the probe is worth instead of how often it
is chosen.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from training.config import ExpansionAxis, TrainingConfig


@dataclass(frozen=True)
class LayerUse:
    """What probing measured in one layer.

    Args:
        members: index of each old expert's set, in the order of the router's rows; the probe is not among them.
        frequencies: share of tokens whose top-k holds the expert: one per member, then the probe's.
        rise: held-out loss with the probe masked in this layer alone minus the loss with all probes, nats per answer
            token; None where the policy does not ask.
    """

    members: tuple[int, ...]
    frequencies: tuple[float, ...]
    rise: float | None = None

    @property
    def probe_frequency(self) -> float:
        """`freq[l]`."""
        return self.frequencies[-1]

    @property
    def most_used(self) -> int | None:
        """Index of the most-used old set, the oldest of equals; None where there is no old expert."""
        if not self.members:
            return None
        return self.members[max(range(len(self.members)), key=lambda e: (self.frequencies[e], -e))]


@dataclass(frozen=True)
class Everywhere:
    """An expert in every layer; nothing is probed."""

    probes = False
    masks = False

    def expand(self, measured: Mapping[int, LayerUse]) -> frozenset[int]:
        """All layers."""
        return frozenset(measured)


@dataclass(frozen=True)
class Paper:
    """Expand layer l if `freq[l] > mean - alpha * std` (paper; population deviation: ours).

    Args:
        axis: "layers": mean and deviation over the probe's frequency in all layers; "experts": over the frequencies of
            all experts of layer l, probe included. The paper can be read both ways.
        alpha: finite; below 0 (ours) the threshold lies above the mean, and fewer layers are expanded.
    """

    axis: ExpansionAxis
    alpha: float
    probes = True
    masks = False

    def expand(self, measured: Mapping[int, LayerUse]) -> frozenset[int]:
        """The layers above their threshold."""
        over_layers = [use.probe_frequency for use in measured.values()]
        chosen = set()
        for layer, use in measured.items():
            values = over_layers if self.axis == "layers" else use.frequencies
            if use.probe_frequency > statistics.fmean(values) - self.alpha * statistics.pstdev(values):
                chosen.add(layer)
        return frozenset(chosen)


@dataclass(frozen=True)
class Calibrated:
    """Expand layer l if masking the probe in that layer alone raises held-out loss by more than `tolerance` (ours).

    Args:
        tolerance: nats per answer token, 0 or more.
    """

    tolerance: float
    probes = True
    masks = True

    def expand(self, measured: Mapping[int, LayerUse]) -> frozenset[int]:
        """The layers whose probe is missed; they may be none."""
        return frozenset(layer for layer, use in measured.items() if use.rise is not None and use.rise > self.tolerance)


ExpansionPolicy = Everywhere | Paper | Calibrated


def expansion_policy(config: TrainingConfig) -> ExpansionPolicy:
    """The policy that a configuration names."""
    if config.expansion == "paper":
        return Paper(config.expansion_axis, config.expansion_alpha)
    if config.expansion == "calibrated":
        return Calibrated(config.expansion_tolerance)
    return Everywhere()
