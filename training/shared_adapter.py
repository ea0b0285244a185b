"""One adapter that all tasks share and train in sequence: the baselines that forget.

It does not know repertoires or scores.
Read first: with one expert per layer it is a LoRA fine-tuned in sequence; with 8 under one dense router it is MoELoRA
as in the CoIN benchmark (arXiv 2403.08350). Each task goes on from what the one before has left, with a new optimiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from runtime.model.attach import ExpertModule, MixtureFFN, decoder_layers, fresh_expert
from runtime.model.base import BaseModel
from runtime.model.generation import base_ref
from training.batches import Row
from training.config import TrainingConfig
from training.seeds import seed_for
from training.task import train_mixture

DENSE_EXPERTS = 8
_ROUTER_INIT = 0.02


class SharedAdapter:
    """E experts per layer under one dense router, trainable, float32.

    Args:
        base: frozen.
        name: enters the seeds.
        num_experts: E; every token uses all of them, weighted by the router.
        first_layer: lowest layer with experts.
        config: rank, alpha, rates, seed.
    """

    def __init__(
        self, base: BaseModel, *, name: str, num_experts: int, first_layer: int, config: TrainingConfig
    ) -> None:
        self._base, self._name, self._config = base, name, config
        ref, layers, device = base_ref(base.info), decoder_layers(base.model), base.model.device
        generator = torch.Generator().manual_seed(seed_for(config.seed, name, "experts"))
        self.ffns: dict[int, MixtureFFN] = {}
        for layer in range(first_layer, base.info.num_layers):
            fresh = [
                fresh_expert(layer, rank=config.rank, alpha=config.alpha, base=ref, generator=generator)
                for _ in range(num_experts)
            ]
            router = torch.randn(num_experts, base.info.width, generator=generator) * _ROUTER_INIT
            self.ffns[layer] = MixtureFFN(
                layers[layer].mlp,  # type: ignore[arg-type]
                [ExpertModule(expert, trainable=True).to(device) for expert in fresh],
                nn.Parameter(router.to(device)),
                top_k=num_experts,
            )

    def learn(self, task: str, rows: Sequence[Row]) -> None:
        """Train on with the rows of one more task."""
        train_mixture(self._base, self.ffns, rows, name=f"{self._name}/{task}", config=self._config)

    @property
    def num_parameters(self) -> int:
        """Trained parameters; the router of a single expert decides nothing and is not counted."""
        return sum(tensor.numel() for name, tensor in self._state().items() if self._counts(name))

    def save(self, path: Path) -> None:
        """Write the state to one safetensors file, whole or not at all."""
        partial = path.with_name(f"{path.name}.partial")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self._state().items()}, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Take over what `save` wrote of an adapter of the same sizes."""
        stored = load_file(path)
        with torch.no_grad():
            for name, tensor in self._state().items():
                tensor.copy_(stored[name])

    def _state(self) -> dict[str, torch.Tensor]:
        """Layer and name -> parameter, without those of the base."""
        return {
            f"{layer}.{name}": parameter
            for layer, ffn in self.ffns.items()
            for name, parameter in ffn.named_parameters()
            if not name.startswith("ffn.")
        }

    def _counts(self, name: str) -> bool:
        return not name.endswith(".router") or next(iter(self.ffns.values())).top_k > 1
