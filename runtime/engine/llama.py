"""Our own step for Llama-family models: fused projections over a flat list of tokens, with mixtures in the linears.

It knows nothing of requests; the runner says which tokens enter which range of layers.
Read first: `run_layers` changes the residual stream in place; every linear sees all tokens of the step at once, and
only attention looks at sequences apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import silu
from transformers import PreTrainedModel

from runtime.engine.attention import AttentionPlan
from runtime.engine.explain import RouteWatch
from runtime.engine.kv import KVCache, KVShape
from runtime.engine.linears import Keep, Linear, keep_dense
from runtime.engine.stage import Stage, StagedLayer
from runtime.errors import InvalidInputError
from runtime.model.manifest import Target

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


class LlamaModel:
    """Weights of a Llama-family model, fused for the step.

    `h += out(attention(norm(h)))`, `h += down(silu(gate(norm(h))) * up(norm(h)))`, rotary positions as
    `transformers` computes them.

    Args:
        model: a Hugging Face model; its layers' weights are taken over, it cannot be used afterwards.
        max_context: positions to prepare.
        keep: in which form matrices are kept.
        dtype: of the residual stream, `self.dtype`; None takes the weights'. Keys and values are of `kv_dtype`, the
            weights'.

    Raises:
        InvalidInputError: an architecture or option that this step does not compute.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_context: int,
        keep: Keep = keep_dense,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = model.config
        check_supported(config, max_context)
        self.max_context = max_context
        self.embedding: torch.Tensor = model.model.embed_tokens.weight.detach()
        self.head: Linear = keep("head", 0, model.lm_head.weight.detach())
        self.dtype, self.kv_dtype = dtype or self.embedding.dtype, self.embedding.dtype
        self.device = self.embedding.device
        self.final_norm: torch.Tensor = model.model.norm.weight.detach().to(self.dtype)
        self.epsilon = float(config.rms_norm_eps)
        self.width = int(config.hidden_size)
        self.ffn_width = int(config.intermediate_size)
        self.num_heads = int(config.num_attention_heads)
        self.num_kv_heads = int(config.num_key_value_heads)
        self.head_width = int(getattr(config, "head_dim", None) or self.width // self.num_heads)
        attention_width, kv_width = self.num_heads * self.head_width, self.num_kv_heads * self.head_width
        self._heights: dict[Target, int] = {"q": attention_width, "k": kv_width, "v": kv_width}
        self._heights |= {"o": self.width, "gate": self.ffn_width, "up": self.ffn_width, "down": self.width}
        positions = torch.arange(max_context, device=self.device).unsqueeze(0)
        cos, sin = model.model.rotary_emb(self.embedding[:1].float(), positions)
        self.cos, self.sin = cos[0].to(self.dtype), sin[0].to(self.dtype)
        self.layers: list[LlamaLayer] = []
        modules = model.model.layers
        while len(modules):  # one layer at a time, so that the weights are never held twice as a whole
            self.layers.append(_fuse(modules[0], len(self.layers), keep, self.dtype))
            del modules[0]

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
        return self.embedding[ids].to(self.dtype)

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
            weights = _weigh(mixtures, staged, x) if staged and staged.attends else None
            fused = self._mixed(staged, ("q", "k", "v"), x, layer.qkv, weights)
            attended = plan.attend(cache, index, *self._qkv(layer, fused, cos, sin))
            hidden += self._mixed(staged, ("o",), attended, layer.out, weights)
            x = self._norm(hidden, layer.ffn_norm)
            weights = _weigh(mixtures, staged, x) if staged else None
            gate, up = self._mixed(staged, ("gate", "up"), x, layer.gate_up, weights).chunk(2, dim=1)
            hidden += self._mixed(staged, ("down",), silu(gate) * up, layer.down, weights)
            if mixtures and staged and staged.hyper and weights is not None:
                staged.hyper.add(hidden, x, weights, mixtures.rows)
            if mixtures and mixtures.watch and weights is not None:
                mixtures.watch.note(index, weights)

    def _mixed(
        self,
        staged: StagedLayer | None,
        targets: tuple[Target, ...],
        x: torch.Tensor,
        linear: Linear,
        weights: torch.Tensor | None,
    ) -> torch.Tensor:
        """`W x` of the fused linears `targets`, one after the other in the result, with their experts' updates."""
        y = linear(x)
        update = staged.updates.get(targets) if staged else None
        if update is not None and weights is not None:
            shrunk = update.shrink(x, weights)
            begin = 0
            for target in targets:
                end = begin + self._heights[target]
                update.expand(target, y[:, begin:end], shrunk)
                begin = end
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


def _weigh(mixtures: MixtureRows | None, staged: StagedLayer, x: torch.Tensor) -> torch.Tensor:
    assert mixtures is not None, "a staged layer belongs to mixtures"
    return staged.router.weigh(x, mixtures.rows)


def _fuse(module: Any, index: int, keep: Keep, dtype: torch.dtype) -> LlamaLayer:  # noqa: ANN401 - untyped modules
    attention, ffn = module.self_attn, module.mlp
    qkv = [getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
    gate_up = [getattr(ffn, name).weight.detach() for name in ("gate_proj", "up_proj")]

    def norm(owner: Any, name: str) -> torch.Tensor | None:  # noqa: ANN401 - as above
        found = getattr(owner, name, None)
        return None if found is None else found.weight.detach().to(dtype)

    return LlamaLayer(
        attention_norm=module.input_layernorm.weight.detach().to(dtype),
        qkv=keep("qkv", index, torch.cat([each.weight.detach() for each in qkv])),
        qkv_bias=None if qkv[0].bias is None else torch.cat([each.bias.detach() for each in qkv]).to(dtype),
        q_norm=norm(attention, "q_norm"),
        k_norm=norm(attention, "k_norm"),
        out=keep("out", index, attention.o_proj.weight.detach()),
        ffn_norm=module.post_attention_layernorm.weight.detach().to(dtype),
        gate_up=keep("gate_up", index, torch.cat(gate_up)),
        down=keep("down", index, ffn.down_proj.weight.detach()),
    )


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
