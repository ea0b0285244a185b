"""The experts of a step inside the linears of a Hugging Face model's layers, by hooks.

It knows nothing of sequences or caches.
Read first: `mixing` says which tokens a layer runs next; inside it every linear that an expert updates gives `W x` with
the staged updates. The router reads what the layer's FFN reads and, where experts update attention, what its attention
reads; its weights hold for all linears of the block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from runtime.engine.stage import INPUTS, StagedLayer
from runtime.model.layer_names import LayerNames, split_output
from runtime.model.manifest import Target


class Mixing:
    """One layer over the tokens of one sequence.

    Args:
        staged: of the layer.
        rows: [T], each token's mixture.

    `weights` [T, C] are those that the FFN's router gave, once it has run.
    """

    def __init__(self, staged: StagedLayer, rows: torch.Tensor) -> None:
        self._staged = staged
        self._rows = rows
        self._x: torch.Tensor  # what the FFN reads, [T, D]
        self._shrunk: dict[tuple[Target, ...], torch.Tensor] = {}
        self.weights: torch.Tensor

    def attend(self, x: torch.Tensor) -> None:
        """The attention begins to run over x [T, D]."""
        if self._staged.attends:
            self.weights = self._staged.router.weigh(x, self._rows)

    def feed(self, x: torch.Tensor) -> None:
        """The FFN begins to run over x [T, D]."""
        self.weights, self._x = self._staged.router.weigh(x, self._rows), x

    def update(self, targets: Sequence[Target], x: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        """Add to the outputs [T, H] of linears that read x [T, in], in place."""
        inputs = next(inputs for inputs in INPUTS if targets[0] in inputs)
        update = self._staged.updates.get(inputs)
        if update is not None:
            if inputs not in self._shrunk:
                self._shrunk[inputs] = update.shrink(x, self.weights)
            for target, part in zip(targets, parts, strict=True):
                update.expand(target, part, self._shrunk[inputs])

    def beside(self, y: torch.Tensor) -> None:
        """Add hyper-adapters to the FFN's output [T, D], in place."""
        if self._staged.hyper is not None:
            self._staged.hyper.add(y, self._x, self.weights, self._rows)


class ModuleHooks:
    """Hooks on a model's layers, for good; outside `mixing` they do nothing.

    Args:
        layers: decoder layers.
        names: of their parts, all of which must be there.
        config: of the model.
    """

    def __init__(self, layers: Sequence[nn.Module], names: LayerNames, config: Any) -> None:  # noqa: ANN401 - untyped
        self._config = config
        self._now: Mixing | None = None
        for layer in layers:
            attention, ffn = layer.get_submodule(names.attention), layer.get_submodule(names.ffn)
            attention.register_forward_pre_hook(self._attention_begins, with_kwargs=True)
            ffn.register_forward_pre_hook(self._ffn_begins)
            for name, targets in names.linears.items():
                layer.get_submodule(name).register_forward_hook(partial(self._linear_ran, targets))
            ffn.register_forward_hook(self._ffn_ran)

    @contextmanager
    def mixing(self, mixing: Mixing) -> Iterator[None]:
        """Inside, a layer runs with these mixtures."""
        self._now = mixing
        try:
            yield
        finally:
            self._now = None

    def _attention_begins(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._now is not None:
            self._now.attend(_flat(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]))

    def _ffn_begins(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if self._now is not None:
            self._now.feed(_flat(args[0]))

    def _linear_ran(
        self, targets: tuple[Target, ...], _module: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor
    ) -> None:
        if self._now is not None:
            self._now.update(targets, _flat(args[0]), split_output(_flat(y), targets, self._config))

    def _ffn_ran(self, _module: nn.Module, _args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        if self._now is not None:
            self._now.beside(_flat(y))


def _flat(x: torch.Tensor) -> torch.Tensor:
    """[1, T, D] -> [T, D], the same memory."""
    return x.view(-1, x.shape[-1])
