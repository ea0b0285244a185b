"""Where the weights of a Llama-family model come from: a loaded Hugging Face model, or the files themselves.

It knows nothing of steps.
Read first: `take` gives every weight once, in order of the layers, so that a reader that packs them never holds the
model twice. `StoredLlama` needs no model class of `transformers`, whose import alone takes seconds and 160 MB.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from runtime.errors import UnknownBaseError
from runtime.model.tensor_files import TensorFiles

if TYPE_CHECKING:
    import transformers

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

_ALWAYS = (
    *("hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads"),
    *("num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "vocab_size"),
)
_STATED: Mapping[str, tuple[str, ...]] = {
    "llama": (),
    "mistral": ("sliding_window",),
    "qwen2": ("use_sliding_window", "sliding_window"),
    "qwen3": ("use_sliding_window", "sliding_window", "head_dim"),
}
"""model_type -> what config.json must say beside `_ALWAYS`; for what it leaves out `transformers` has defaults."""


class LlamaSource(Protocol):
    """Weights of one model, each to be taken once.

    `config` is that of `transformers`, or has its attributes; weights are of `dtype` on `device`.
    """

    @property
    def config(self) -> Any:  # noqa: ANN401 - untyped
        """Sizes and options."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""

    @property
    def device(self) -> torch.device:
        """Of the weights."""

    def embedding(self) -> torch.Tensor:
        """[V, D]; of another dtype where that is what is stored."""

    def head(self, rows: range | None = None) -> torch.Tensor:
        """[V, D], or adjacent rows of it: in float32 a vocabulary may be most of a small model."""

    def take(self, name: str) -> torch.Tensor | None:
        """A weight by its name in `transformers`, as `model.layers.0.mlp.up_proj.weight`; None where it has none."""

    def rotary(self, num: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of `num` positions, [num, head width] float32."""

    def end_layer(self, index: int) -> None:
        """Nothing more of this layer will be taken."""


class ModuleSource:
    """The weights of a loaded model, which cannot be used afterwards."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self._model = model
        self.config = model.config
        self.dtype: torch.dtype = model.model.embed_tokens.weight.dtype
        self.device: torch.device = model.model.embed_tokens.weight.device

    def embedding(self) -> torch.Tensor:
        """See `LlamaSource`."""
        found: torch.Tensor = self._model.model.embed_tokens.weight.detach()
        return found

    def head(self, rows: range | None = None) -> torch.Tensor:
        """See `LlamaSource`."""
        found: torch.Tensor = self._model.lm_head.weight.detach()
        return found if rows is None else found[rows.start : rows.stop]

    def take(self, name: str) -> torch.Tensor | None:
        """See `LlamaSource`."""
        try:
            found: torch.Tensor = self._model.get_parameter(name).detach()
        except AttributeError:
            return None
        return found

    def rotary(self, num: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `LlamaSource`."""
        positions = torch.arange(num, device=self.device).unsqueeze(0)
        cos, sin = self._model.model.rotary_emb(torch.zeros(1, 1, device=self.device), positions)
        return cos[0], sin[0]

    def end_layer(self, index: int) -> None:
        """See `LlamaSource`."""
        self._model.model.layers[index] = torch.nn.Identity()


class StoredLlama:
    """The weights of a model that lies in a folder, read as they are asked for.

    Args:
        files: of the folder.
        config: as in config.json; see `can_read`.
        dtype: of the weights that are taken.
        device: where they go.

    Raises:
        UnknownBaseError: a weight is missing, or not of the size that config.json says.
    """

    def __init__(
        self, files: TensorFiles, config: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._files, self.dtype, self.device = files, dtype, device
        self.config = SimpleNamespace(**config)
        wrong = [name for name, shape in _shapes(config).items() if files.shape(name) != shape]
        if wrong:
            raise UnknownBaseError(f"weights are missing or of the wrong size: {', '.join(wrong[:3])}")

    @staticmethod
    def can_read(config: Mapping[str, Any], files: TensorFiles) -> bool:
        """Whether config.json says all that is needed, of a model whose weights are stored under their usual names."""
        stated = _STATED.get(str(config.get("model_type")))
        if stated is None or not all(field in config for field in (*_ALWAYS, *stated)):
            return False
        plain = config.get("quantization_config") is None and not config.get("partial_rotary_factor")
        return plain and _theta(config) is not None and files.shape(EMBEDDING) is not None

    def embedding(self) -> torch.Tensor:
        """See `LlamaSource`; on a CPU its rows stay in the file until they are first looked at."""
        if self.device.type == "cpu":
            return self._files.mapped(EMBEDDING)
        return self._files.read(EMBEDDING, self.dtype).to(self.device)

    def head(self, rows: range | None = None) -> torch.Tensor:
        """See `LlamaSource`."""
        return self._read(EMBEDDING if self.config.tie_word_embeddings else HEAD, rows)

    def take(self, name: str) -> torch.Tensor | None:
        """See `LlamaSource`."""
        return None if self._files.shape(name) is None else self._read(name)

    def rotary(self, num: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `LlamaSource`; `angle[p, i] = p / theta^(2 i / width)`, each twice (arXiv 2104.09864)."""
        config, theta = self.config, _theta(vars(self.config))
        assert theta is not None, "can_read has seen to it"
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        inverse = 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.float) / width))
        angles = torch.arange(num).unsqueeze(1).float() * inverse
        angles = torch.cat((angles, angles), dim=1)
        return angles.cos().to(self.device), angles.sin().to(self.device)

    def end_layer(self, index: int) -> None:
        """See `LlamaSource`."""

    def _read(self, name: str, rows: range | None = None) -> torch.Tensor:
        return self._files.read(name, self.dtype, rows).to(self.device)


def _theta(config: Mapping[str, Any]) -> float | None:
    """The base of plain rotary positions; None where they are scaled in some way."""
    told = config.get("rope_parameters")
    told = told if isinstance(told, dict) else {"rope_theta": config.get("rope_theta")}
    scaled = config.get("rope_scaling") or told.get("rope_type", "default") != "default"
    theta = told.get("rope_theta")
    return float(theta) if isinstance(theta, int | float) and not scaled and len(told) <= 2 else None


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every weight that the model must have."""
    width, ffn, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    attention, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocabulary, width), FINAL_NORM: (width,)}
    if not config["tie_word_embeddings"]:
        shapes[HEAD] = (vocabulary, width)
    layer = {
        "self_attn.q_proj.weight": (attention, width),
        "self_attn.k_proj.weight": (kv, width),
        "self_attn.v_proj.weight": (kv, width),
        "self_attn.o_proj.weight": (width, attention),
        "mlp.gate_proj.weight": (ffn, width),
        "mlp.up_proj.weight": (ffn, width),
        "mlp.down_proj.weight": (width, ffn),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    if config["model_type"] == "qwen2":
        layer |= {f"self_attn.{name}_proj.bias": (size,) for name, size in (("q", attention), ("k", kv), ("v", kv))}
    if config["model_type"] == "qwen3":
        layer |= {f"self_attn.{name}_norm.weight": (head,) for name in ("q", "k")}
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes
