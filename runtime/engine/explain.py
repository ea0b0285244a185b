"""Which experts and groups an answer was made of: the router's weights per layer, averaged over its tokens.

It knows nothing of routers; it reads the weights that a step has computed.
Read first: every token of the answer counts once, by the weights of the token that produced it. The weights are those
of the FFN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from runtime.engine.request import LayerWeights
from runtime.engine.stage import Stage
from runtime.engine.staged_router import StagedColumn


@dataclass
class _Sum:
    num_tokens: int = 0
    experts: dict[str, float] = field(default_factory=dict)
    groups: dict[str, float] = field(default_factory=dict)


class Explanation:
    """Sums over the tokens of one answer."""

    def __init__(self) -> None:
        self._layers: dict[int, _Sum] = {}

    def add(self, layer: int, columns: Sequence[StagedColumn], weights: Sequence[float]) -> None:
        """Count one token: what each of its mixture's columns weighs in a layer."""
        total = self._layers.setdefault(layer, _Sum())
        total.num_tokens += 1
        for column, weight in zip(columns, weights, strict=True):
            total.experts[column.expert] = total.experts.get(column.expert, 0.0) + weight
            if column.group:
                total.groups[column.group] = total.groups.get(column.group, 0.0) + weight

    def layers(self) -> tuple[LayerWeights, ...]:
        """Mean weights per layer, ascending; empty where no expert had a part."""
        return tuple(
            LayerWeights(
                layer=layer,
                experts={digest: weight / total.num_tokens for digest, weight in total.experts.items()},
                groups={name: weight / total.num_tokens for name, weight in total.groups.items()},
            )
            for layer, total in sorted(self._layers.items())
        )


class RouteWatch:
    """The weights that one range of layers gives to some of its tokens.

    Args:
        tokens: which of the tokens -> who wants to know, and the row of its mixture.
    """

    def __init__(self, tokens: Mapping[int, tuple[Explanation, int]]) -> None:
        self.tokens = dict(tokens)
        self._layers: dict[int, torch.Tensor] = {}

    def note(self, layer: int, weights: torch.Tensor) -> None:
        """Keep what is asked for of a layer's weights [T, C]."""
        self._layers[layer] = weights[list(self.tokens)].cpu()

    def tell(self, stage: Stage) -> None:
        """Count all that was noted; a token whose mixture has no router in a layer counts nothing there."""
        for layer, weights in self._layers.items():
            router = stage.layers[layer].router
            for place, (explanation, row) in enumerate(self.tokens.values()):
                span = router.span(row)
                if span is not None:
                    explanation.add(layer, router.columns[span], weights[place, span].tolist())
