"""Our own step for Llama-family models: fused projections over a flat list of tokens, with mixtures in the linears.

It knows nothing of requests; the runner says which tokens enter which range of layers.
Read first: `run_layers` changes the residual stream in place; every linear sees all tokens of the step at once, and
only attention looks at sequences apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import silu

from runtime.engine.attention import AttentionPlan
from runtime.engine.explain import RouteWatch
from runtime.engine.kv import KVCache, KVShape
from runtime.engine.linears import Keep, Linear, keep_dense
from runtime.engine.stage import Stage, StagedLayer
from runtime.errors import InvalidInputError
from runtime.kernels.inspection import Inspector
from runtime.kernels.triton_metadata import MixtureMetadata
from runtime.kernels.triton_mixture import Launcher
from runtime.model.llama_source import FINAL_NORM, LlamaSource, ModuleSource
from runtime.model.manifest import Target

if TYPE_CHECKING:
    import transformers

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class LlamaLayer:
    """One layer; linears that read the same input are fused; what a model has not is None."""

    attention_norm: torch.Tensor
    qkv: Linear
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    out: Linear
    ffn_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class MixtureRows:
    """Which mixture each token of a step uses.

    Args:
        stage: what is packed.
        rows: [T] int64, row in `Stage.rows`.
        watch: gets the weights of the tokens it asks for; None where nobody does.
    """

    stage: Stage
    rows: torch.Tensor
    watch: RouteWatch | None = None


@dataclass(frozen=True)
class _Routed:
    """Weights [T, C] of a layer's columns for a step's tokens, and the same as the GPU's kernels read it."""

    weights: torch.Tensor
    metadata: MixtureMetadata | None


class LlamaModel:
    """Weights of a Llama-family model, fused for the step.

    `h += out(attention(norm(h)))`, `h += down(silu(gate(norm(h))) * up(norm(h)))`, rotary positions as
    `transformers` computes them.

    Args:
        model: where the weights come from; a Hugging Face model cannot be used afterwards.
        max_context: positions to prepare.
        keep: in which form matrices are kept.
        dtype: of the residual stream, `self.dtype`; None takes the weights'. Keys and values are of `kv_dtype`, the
            weights'.

    Raises:
        InvalidInputError: an architecture or option that this step does not compute.
    """

    recordable = True

    def __init__(
        self,
        model: transformers.PreTrainedModel | LlamaSource,
        *,
        max_context: int,
        keep: Keep = keep_dense,
        dtype: torch.dtype | None = None,
        launch: Launcher | None = None,
    ) -> None:
        self._launch = launch
        source = ModuleSource(model) if isinstance(model, torch.nn.Module) else model
        config = source.config
        check_supported(config, max_context)
        self.max_context = max_context
        self.inspector = Inspector()
        self.embedding = source.embedding()
        self.head: Linear = self._keep_head(source, keep)
        self.dtype, self.kv_dtype = dtype or source.dtype, source.dtype
        self._weight_dtype, self.device = source.dtype, source.device
        self.final_norm = _taken(source, FINAL_NORM).to(self.dtype)
        self.epsilon = float(config.rms_norm_eps)
        self.width = int(config.hidden_size)
        self.ffn_width = int(config.intermediate_size)
        self.num_heads = int(config.num_attention_heads)
        self.num_kv_heads = int(config.num_key_value_heads)
        self.head_width = int(getattr(config, "head_dim", None) or self.width // self.num_heads)
        attention_width, kv_width = self.num_heads * self.head_width, self.num_kv_heads * self.head_width
        self._heights: dict[Target, int] = {"q": attention_width, "k": kv_width, "v": kv_width}
        self._heights |= {"o": self.width, "gate": self.ffn_width, "up": self.ffn_width, "down": self.width}
        self.cos, self.sin = (table.to(self.dtype) for table in source.rotary(max_context))
        self.layers: list[LlamaLayer] = []
        for index in range(int(config.num_hidden_layers)):  # one at a time: the weights are never held twice as a whole
            self.layers.append(_fuse(source, index, keep, self.dtype))
            source.end_layer(index)

    def _keep_head(self, source: LlamaSource, keep: Keep) -> Linear:
        return keep("head", 0, source.head())

    def kv_shape(self) -> KVShape:
        """Sizes of the KV cache that this model needs."""
        return KVShape(
            num_layers=len(self.layers),
            num_heads=self.num_kv_heads,
            head_width=self.head_width,
            context=self.max_context,
        )

    def embed(self, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG002 - rotary
        """[T] -> [T, D], a new tensor, wherever the tokens stand."""
        return self.embedding[ids].to(self._weight_dtype).to(self.dtype)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Residual stream after the last layer -> logits: [T, D] -> [T, V] float32."""
        return self.head(self._norm(hidden, self.final_norm)).float()

    def forget(self, running: frozenset[str]) -> None:
        """Let go of what was prepared for mixtures other than those `running`, which are named by digest."""

    def run_layers(
        self,
        hidden: torch.Tensor,
        layers: range,
        plan: AttentionPlan,
        cache: KVCache,
        mixtures: MixtureRows | None,
    ) -> None:
        """Run a range of layers over the residual stream `hidden` [T, D], in place.

        Args:
            hidden: changed.
            layers: which layers.
            plan: where the T tokens lie.
            cache: changed at the tokens' places.
            mixtures: None where all of these layers are base-only.
        """
        cos, sin = (table[plan.positions].unsqueeze(1) for table in (self.cos, self.sin))
        for index in layers:
            layer = self.layers[index]
            staged = mixtures.stage.layers.get(index) if mixtures else None
            x = self._norm(hidden, layer.attention_norm)
            routed = self._route(mixtures, staged, x) if staged and staged.attends else None
            fused = self._mixed(staged, ("q", "k", "v"), x, layer.qkv, routed)
            attended = plan.attend(cache, index, *self._qkv(layer, fused, cos, sin))
            hidden += self._mixed(staged, ("o",), attended, layer.out, routed)
            x = self._norm(hidden, layer.ffn_norm)
            routed = self._route(mixtures, staged, x) if staged else None
            gate, up = self._mixed(staged, ("gate", "up"), x, layer.gate_up, routed).chunk(2, dim=1)
            hidden += self._mixed(staged, ("down",), silu(gate) * up, layer.down, routed)
            if mixtures and staged and staged.hyper and routed is not None:
                staged.hyper.add(hidden, x, routed.weights, mixtures.rows)
            if mixtures and mixtures.watch and routed is not None:
                mixtures.watch.note(index, routed.weights)

    def _route(self, mixtures: MixtureRows | None, staged: StagedLayer, x: torch.Tensor) -> _Routed:
        assert mixtures is not None, "a staged layer belongs to mixtures"
        weights = staged.router.weigh(x, mixtures.rows)
        return _Routed(weights, staged.kernel_columns.metadata(weights) if self._launch else None)

    def _mixed(
        self,
        staged: StagedLayer | None,
        targets: tuple[Target, ...],
        x: torch.Tensor,
        linear: Linear,
        routed: _Routed | None,
    ) -> torch.Tensor:
        """`W x` of the fused linears `targets`, one after the other in the result, with their experts' updates."""
        y = linear(x)
        update = staged.updates.get(targets) if staged else None
        if staged is None or update is None or routed is None:
            return y
        shrunk = update.shrink(x, routed.weights) if routed.metadata is None else None
        begin = 0
        for target in targets:
            part = y[:, begin : begin + self._heights[target]]
            begin += self._heights[target]
            if shrunk is not None:
                update.expand(target, part, shrunk)
            elif self._launch and routed.metadata and target in update.b:
                staged.kernel_updates[target].add(part, x, routed.metadata, self._launch)
        return y

    def _qkv(
        self, layer: LlamaLayer, fused: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if layer.qkv_bias is not None:
            fused = fused + layer.qkv_bias
        heads = fused.view(fused.shape[0], -1, self.head_width)
        split = self.num_heads + self.num_kv_heads
        rotated, v = heads[:, :split], heads[:, split:]
        if layer.q_norm is not None and layer.k_norm is not None:
            parts = ((rotated[:, : self.num_heads], layer.q_norm), (rotated[:, self.num_heads :], layer.k_norm))
            rotated = torch.cat([self._norm(part, weight) for part, weight in parts], dim=1)
        first, second = rotated.chunk(2, dim=2)
        rotated = rotated * cos + torch.cat((-second, first), dim=2) * sin
        return rotated[:, : self.num_heads], rotated[:, self.num_heads :], v

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, self.epsilon)


def _fuse(source: LlamaSource, index: int, keep: Keep, dtype: torch.dtype) -> LlamaLayer:
    def taken(name: str) -> torch.Tensor:
        return _taken(source, f"model.layers.{index}.{name}")

    def vector(name: str) -> torch.Tensor | None:
        found = source.take(f"model.layers.{index}.{name}")
        return None if found is None else found.to(dtype)

    biases = [vector(f"self_attn.{name}_proj.bias") for name in ("q", "k", "v")]
    return LlamaLayer(
        attention_norm=taken("input_layernorm.weight").to(dtype),
        qkv=keep("qkv", index, torch.cat([taken(f"self_attn.{name}_proj.weight") for name in ("q", "k", "v")])),
        qkv_bias=None if biases[0] is None else torch.cat([bias for bias in biases if bias is not None]),
        q_norm=vector("self_attn.q_norm.weight"),
        k_norm=vector("self_attn.k_norm.weight"),
        out=keep("out", index, taken("self_attn.o_proj.weight")),
        ffn_norm=taken("post_attention_layernorm.weight").to(dtype),
        gate_up=keep("gate_up", index, torch.cat([taken(f"mlp.{name}_proj.weight") for name in ("gate", "up")])),
        down=keep("down", index, taken("mlp.down_proj.weight")),
    )


def _taken(source: LlamaSource, name: str) -> torch.Tensor:
    found = source.take(name)
    assert found is not None, f"a model that is supported has {name}"
    return found


def check_supported(config: Any, max_context: int) -> None:  # noqa: ANN401 - untyped
    """Raise InvalidInputError for what this step does not compute, naming the option and its value."""
    kind = getattr(config, "model_type", None)
    if kind not in SUPPORTED:
        raise InvalidInputError("base", kind, f"the engine runs {', '.join(SUPPORTED)} models")
    if not 1 <= max_context <= config.max_position_embeddings:
        raise InvalidInputError("max_context", max_context, f"the base reads up to {config.max_position_embeddings}")
    # An attention bias of Llama's is on the output too; Qwen2 always has one on q, k and v, and says nothing of it.
    for field, wanted in (("hidden_act", "silu"), ("mlp_bias", False), ("attention_bias", False)):
        found = getattr(config, field, wanted)
        if found != wanted:
            raise InvalidInputError(f"base config {field}", found, f"the engine computes {wanted!r} only")
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < max_context:
        raise InvalidInputError("max_context", max_context, f"the base's attention slides over {window} tokens")
