"""The lower layers of a Llama-family model as a graph: token embeddings in, pooled feature of the prompt out.

It does not know prompts, tokenizers or locators, and leaves verification to `exporters.onnx_features`.
Read first: one prompt at a time, causal, without a cache; linears are `MatMulNBits` over 8-bit codes, all else is
float32. The embedding table stays outside: a prompt needs a few of its rows.
"""

from __future__ import annotations

from typing import Any

import onnx
import torch
from torch import nn

from exporters.block_codes import BITS, BLOCK, Codes
from runtime.errors import InvalidInputError
from runtime.model.base import BaseModel
from runtime.model.locator import TAIL, num_parts
from runtime.model.manifest import Feature

DOMAIN = "com.microsoft"

FLOAT_ACTIVATIONS, CODED_ACTIVATIONS = 1, 4
"""What onnxruntime calls accuracy levels of `MatMulNBits`: inputs stay float32, or are rounded to 8 bits per block."""

ROTARY = """\
    position_floats = Cast<to = 1>(position_columns)
    half_angles = Mul(position_floats, inv_freq)
    angles = Concat<axis = -1>(half_angles, half_angles)
    cosine_unscaled = Cos(angles)
    cosine = Mul(cosine_unscaled, rope_scale)
    sine_unscaled = Sin(angles)
    sine = Mul(sine_unscaled, rope_scale)
"""
"""Cosine and sine [T, width / 2 twice] of the positions in `position_columns`; shared by both Llama graphs."""

_START = (
    """
    zero = Constant<value_int = 0>()
    one = Constant<value_int = 1>()
    first = Constant<value_ints = [0]>()
    second = Constant<value_ints = [1]>()
    last = Constant<value_ints = [-1]>()
    eps = Constant<value_float = {eps}>()
    attention_scale = Constant<value_float = {attention_scale}>()
    rope_scale = Constant<value_float = {rope_scale}>()
    num_tokens = Shape<start = 0, end = 1>(embeddings)
    num_tokens_scalar = Squeeze(num_tokens)
    positions = Range(zero, num_tokens_scalar, one)
    position_columns = Unsqueeze(positions, second)
    position_rows = Unsqueeze(positions, first)
"""
    + ROTARY
    + """    is_later = Greater(position_rows, position_columns)
    never = Constant<value_float = -1e30>()
    always = Constant<value_float = 0.0>()
    mask = Where(is_later, never, always)
    query_shape = Constant<value_ints = [0, {num_kv_heads}, {group}, {head_size}]>()
    key_shape = Constant<value_ints = [0, {num_kv_heads}, 1, {head_size}]>()
    context_shape = Constant<value_ints = [0, {attention_width}]>()
    hidden_0 = Identity(embeddings)
"""
)

NORM = """
    {out}_square = Mul({x}, {x})
    {out}_mean = ReduceMean<keepdims = 1>({out}_square, last)
    {out}_shifted = Add({out}_mean, eps)
    {out}_root = Sqrt({out}_shifted)
    {out}_unit = Div({x}, {out}_root)
    {out} = Mul({out}_unit, {out}_weight)
"""

LINEAR = """
    {out} = com.microsoft.MatMulNBits
        <K = {wide}, N = {narrow}, bits = {bits}, block_size = {block}, accuracy_level = {level}>
        ({x}, {out}_codes, {out}_scales)
"""

ROTATE_HEADS = """
    {x}_lower, {x}_upper = Split<axis = -1, num_outputs = 2>({x}_heads)
    {x}_negative = Neg({x}_upper)
    {x}_turned = Concat<axis = -1>({x}_negative, {x}_lower)
    {x}_cosine = Mul({x}_heads, cosine)
    {x}_sine = Mul({x}_turned, sine)
    {x}_rotated = Add({x}_cosine, {x}_sine)
"""

_ROTATE = (
    """
    {x}_split = Reshape({x}, {shape})
    {x}_heads = Transpose<perm = [1, 2, 0, 3]>({x}_split)
"""
    + ROTATE_HEADS
)

_ATTEND = """
    l{i}_k_columns = Transpose<perm = [0, 1, 3, 2]>(l{i}_k_rotated)
    l{i}_v_split = Reshape(l{i}_v, key_shape)
    l{i}_v_heads = Transpose<perm = [1, 2, 0, 3]>(l{i}_v_split)
    l{i}_products = MatMul(l{i}_q_rotated, l{i}_k_columns)
    l{i}_scaled = Mul(l{i}_products, attention_scale)
    l{i}_masked = Add(l{i}_scaled, mask)
    l{i}_shares = Softmax<axis = -1>(l{i}_masked)
    l{i}_context_heads = MatMul(l{i}_shares, l{i}_v_heads)
    l{i}_context_split = Transpose<perm = [2, 0, 1, 3]>(l{i}_context_heads)
    l{i}_context = Reshape(l{i}_context_split, context_shape)
"""

ACTIVATE = """
    l{i}_sigmoid = Sigmoid(l{i}_gate)
    l{i}_silu = Mul(l{i}_gate, l{i}_sigmoid)
    l{i}_ffn = Mul(l{i}_silu, l{i}_up)
"""

_POOL = """
    last_token = Sub(num_tokens, second)
    start = Min(last_token, second)
    pooled_tokens = Slice({x}, start, num_tokens, first)
"""

_MEAN = """
    features = ReduceMean<keepdims = 1>(pooled_tokens, first)
"""

_PARTS = """
    mean = ReduceMean<keepdims = 1>(pooled_tokens, first)
    num_tail = Constant<value_ints = [{tail}]>()
    before_tail = Sub(num_tokens, num_tail)
    tail_start = Max(before_tail, first)
    tail_tokens = Slice({x}, tail_start, num_tokens, first)
    tail = ReduceMean<keepdims = 1>(tail_tokens, first)
    words = Slice(embeddings, start, num_tokens, first)
    words_mean = ReduceMean<keepdims = 1>(words, first)
    features = Concat<axis = 1>(mean, tail, words_mean)
"""

_LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def check_llama(base: BaseModel) -> None:
    """Check that the graph says what this base computes.

    Raises:
        InvalidInputError: another architecture, or a variant that the graph does not know.
    """
    config = base.model.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    for field, value, known in (
        ("architecture", base.info.architecture, ("LlamaForCausalLM",)),
        ("hidden_act", config.hidden_act, ("silu",)),
        ("attention_bias", config.attention_bias, (False,)),
        ("mlp_bias", config.mlp_bias, (False,)),
        ("rope_type", rope, ("default", "linear", "llama3", "yarn")),
    ):
        if value not in known:
            raise InvalidInputError(f"base: {field}", value, f"the graph is of {' or '.join(map(str, known))}")


def linears(base: BaseModel, num_layers: int) -> dict[str, nn.Linear]:
    """Name in the graph -> module, of all linears of the lower layers."""
    layers = base.model.model.layers
    return {f"l{i}_{name}": layers[i].get_submodule(path) for i in range(num_layers) for name, path in _LINEARS.items()}


def llama_graph(base: BaseModel, num_layers: int, feature: Feature) -> str:
    """The graph in ONNX's textual syntax; `embeddings` [T, D] -> `features` [1, D], with float32 activations.

    In parts they are [1, 3 D].
    """
    config, width = base.model.config, base.info.width
    head_size = config.head_dim
    sizes = {name: (module.in_features, module.out_features) for name, module in linears(base, num_layers).items()}

    def linear(out: str, x: str) -> str:
        wide, narrow = sizes[out]
        return LINEAR.format(out=out, x=x, wide=wide, narrow=narrow, bits=BITS, block=BLOCK, level=FLOAT_ACTIVATIONS)

    parts = [
        _START.format(
            eps=config.rms_norm_eps,
            attention_scale=head_size**-0.5,
            rope_scale=float(base.model.model.rotary_emb.attention_scaling),
            num_kv_heads=config.num_key_value_heads,
            group=config.num_attention_heads // config.num_key_value_heads,
            head_size=head_size,
            attention_width=config.num_attention_heads * head_size,
        )
    ]
    for i in range(num_layers):
        parts += [
            NORM.format(out=f"l{i}_attention_norm", x=f"hidden_{i}"),
            *(linear(f"l{i}_{name}", f"l{i}_attention_norm") for name in "qkv"),
            _ROTATE.format(x=f"l{i}_q", shape="query_shape"),
            _ROTATE.format(x=f"l{i}_k", shape="key_shape"),
            _ATTEND.format(i=i),
            linear(f"l{i}_o", f"l{i}_context"),
            f"    l{i}_attended = Add(hidden_{i}, l{i}_o)\n",
            NORM.format(out=f"l{i}_ffn_norm", x=f"l{i}_attended"),
            *(linear(f"l{i}_{name}", f"l{i}_ffn_norm") for name in ("gate", "up")),
            ACTIVATE.format(i=i),
            linear(f"l{i}_down", f"l{i}_ffn"),
            f"    hidden_{i + 1} = Add(l{i}_attended, l{i}_down)\n",
        ]
    end = _POOL + (_PARTS if feature == "residual_parts" else _MEAN)
    parts.append(end.format(x=f"hidden_{num_layers}", tail=TAIL))
    wide = num_parts(feature) * width
    return f"features (float[T, {width}] embeddings) => (float[1, {wide}] features) {{{''.join(parts)}}}"


def code_activations(model: onnx.ModelProto) -> None:
    """Let every linear round its input to 8 bits, in place: several times faster."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = CODED_ACTIVATIONS


def llama_tensors(base: BaseModel, num_layers: int, codes: dict[str, Codes]) -> dict[str, torch.Tensor]:
    """Constants of the graph by name; `codes` of every linear."""
    model: Any = base.model.model
    tensors = {"inv_freq": model.rotary_emb.inv_freq.float()}
    for name, coded in codes.items():
        tensors |= {f"{name}_codes": coded.codes, f"{name}_scales": coded.scales}
    for i in range(num_layers):
        for name, path in NORMS.items():
            tensors[f"l{i}_{name}_weight"] = model.layers[i].get_submodule(path).weight.detach().float()
    return tensors
