"""A whole Llama-family model with a KV cache and a mixture in its linears, as text: token ids in, logits and cache out.

It does not know tasks, tokenizers or verification (`exporters.onnx_model`); weights come as float32 or as codes.
Read first: B sequences of equal length, flat as [B*T, D] except in attention and in routing. Expert slots are inputs,
stacked over the layers from `first_layer` on; `exporters.mixture_inputs` says what they hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from exporters.block_codes import BLOCK
from exporters.onnx_llama import ACTIVATE, FLOAT_ACTIVATIONS, LINEAR, NORM, ROTARY, ROTATE_HEADS, linears
from exporters.onnx_model_hyper import INPUTS as HYPER_INPUTS
from exporters.onnx_model_hyper import adapt
from exporters.onnx_model_routing import INPUTS, KIND_INPUTS, KIND_START, START, layer_slots, route
from runtime.model.base import BaseModel
from runtime.model.manifest import ATTENTION_TARGETS, FFN_TARGETS, TARGETS, Target

HEAD, EMBEDDING = "head", "embedding"

_INPUTS = """
    int64[B, T] ids, int64[1] logits_to_keep,
    float[{num_layers}, B, {num_kv_heads}, P, {head_size}] past_keys,
    float[{num_layers}, B, {num_kv_heads}, P, {head_size}] past_values,
    {routing}
    {updates}
"""

_UPDATE_INPUTS = """
    float[{num_mixed}, S_{t}, {wide}] {t}_a, float[{num_mixed}, S_{t}, {narrow}] {t}_b,
    float[{num_mixed}, C, S_{t}] {t}_spread
"""

_OUTPUTS = """
    float[B, K, {vocab_size}] logits,
    float[{num_layers}, B, {num_kv_heads}, N, {head_size}] keys,
    float[{num_layers}, B, {num_kv_heads}, N, {head_size}] values
"""

_ENTERING = ", float[B, T, {width}] entering"

_START = (
    """
    zero = Constant<value_int = 0>()
    one = Constant<value_int = 1>()
    first = Constant<value_ints = [0]>()
    second = Constant<value_ints = [1]>()
    third = Constant<value_ints = [2]>()
    last = Constant<value_ints = [-1]>()
    last_two = Constant<value_ints = [1, 2]>()
    eps = Constant<value_float = {eps}>()
    attention_scale = Constant<value_float = {attention_scale}>()
    rope_scale = Constant<value_float = {rope_scale}>()
    never = Constant<value_float = -1e30>()
    nothing = Constant<value_float = 0.0>()
    batch = Shape<start = 0, end = 1>(ids)
    num_tokens = Shape<start = 1, end = 2>(ids)
    num_past = Shape<start = 3, end = 4>(past_keys)
    num_positions = Add(num_past, num_tokens)
    num_past_scalar = Squeeze(num_past)
    num_positions_scalar = Squeeze(num_positions)
    positions = Range(num_past_scalar, num_positions_scalar, one)
    context = Range(zero, num_positions_scalar, one)
    position_columns = Unsqueeze(positions, second)
    context_rows = Unsqueeze(context, first)
"""
    + ROTARY
    + """    is_later = Greater(context_rows, position_columns)
    mask = Where(is_later, never, nothing)
    query_heads = Constant<value_ints = [{num_kv_heads}, {group}, {head_size}]>()
    key_heads = Constant<value_ints = [{num_kv_heads}, 1, {head_size}]>()
    query_shape = Concat<axis = 0>(batch, num_tokens, query_heads)
    key_shape = Concat<axis = 0>(batch, num_tokens, key_heads)
    context_shape = Constant<value_ints = [-1, {attention_width}]>()
    flat_shape = Constant<value_ints = [-1, {width}]>()
    sequence_shape = Concat<axis = 0>(batch, num_tokens, last)
"""
)

_EMBED = "    embedded = Gather<axis = 0>({table}_weight, ids)\n"

_EMBED_CODES = """
    embedded_codes = Gather<axis = 0>({table}_codes, ids)
    embedded_bytes = Cast<to = 1>(embedded_codes)
    code_zero = Constant<value_float = 128.0>()
    embedded_steps = Sub(embedded_bytes, code_zero)
    embedded_scales = Gather<axis = 0>({table}_scales, ids)
    embedded_scale_columns = Unsqueeze(embedded_scales, last)
    embedded_blocks = Mul(embedded_steps, embedded_scale_columns)
    embedded_shape = Concat<axis = 0>(batch, num_tokens, last)
    embedded_filled = Reshape(embedded_blocks, embedded_shape)
    width = Constant<value_ints = [{width}]>()
    embedded = Slice(embedded_filled, first, width, last)
"""

_FLOAT_LINEAR = "    {out} = Gemm<transB = 1>({x}, {out}_weight)\n"

_ROTATE = (
    """
    {x}_split = Reshape({x}, {shape})
    {x}_heads = Transpose<perm = [0, 2, 3, 1, 4]>({x}_split)
"""
    + ROTATE_HEADS
)

_ATTEND = """
    l{i}_layer = Constant<value_int = {i}>()
    l{i}_past_keys = Gather<axis = 0>(past_keys, l{i}_layer)
    l{i}_past_values = Gather<axis = 0>(past_values, l{i}_layer)
    l{i}_new_keys = Squeeze(l{i}_k_rotated, third)
    l{i}_v_split = Reshape(l{i}_v, key_shape)
    l{i}_v_heads = Transpose<perm = [0, 2, 3, 1, 4]>(l{i}_v_split)
    l{i}_new_values = Squeeze(l{i}_v_heads, third)
    l{i}_keys = Concat<axis = 2>(l{i}_past_keys, l{i}_new_keys)
    l{i}_values = Concat<axis = 2>(l{i}_past_values, l{i}_new_values)
    l{i}_keys_out = Unsqueeze(l{i}_keys, first)
    l{i}_values_out = Unsqueeze(l{i}_values, first)
    l{i}_key_columns = Transpose<perm = [0, 1, 3, 2]>(l{i}_keys)
    l{i}_group_keys = Unsqueeze(l{i}_key_columns, third)
    l{i}_group_values = Unsqueeze(l{i}_values, third)
    l{i}_products = MatMul(l{i}_q_rotated, l{i}_group_keys)
    l{i}_scaled = Mul(l{i}_products, attention_scale)
    l{i}_masked = Add(l{i}_scaled, mask)
    l{i}_shares = Softmax<axis = -1>(l{i}_masked)
    l{i}_context_heads = MatMul(l{i}_shares, l{i}_group_values)
    l{i}_context_split = Transpose<perm = [0, 3, 1, 2, 4]>(l{i}_context_heads)
    l{i}_context = Reshape(l{i}_context_split, context_shape)
"""

_UPDATE = """
    {out}_a = Gather<axis = 0>({t}_a, l{i}_slot)
    {out}_b = Gather<axis = 0>({t}_b, l{i}_slot)
    {out}_spread = Gather<axis = 0>({t}_spread, l{i}_slot)
    {out}_inner = Gemm<transB = 1>({x}, {out}_a)
    {out}_rank_weights = MatMul({weights}, {out}_spread)
    {out}_weighted = Mul({out}_inner, {out}_rank_weights)
    {out}_update = MatMul({out}_weighted, {out}_b)
    {out} = Add({out}_base, {out}_update)
"""

_END = """
    keys = Concat<axis = 0>({keys})
    values = Concat<axis = 0>({values})
    residual = Reshape(hidden_{num_layers}, sequence_shape)
    kept_from = Sub(num_tokens, logits_to_keep)
    kept = Slice(residual, kept_from, num_tokens, second)
    kept_flat = Reshape(kept, flat_shape)
{norm}{head}
    kept_shape = Concat<axis = 0>(batch, logits_to_keep, last)
    logits = Reshape(head, kept_shape)
"""


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Which slots a graph has beside those of top-k routers and of experts of the FFN.

    Args:
        attends: for experts of q, k, v and o.
        kinds: for routers of all kinds, with the output `entering`.
        hyper: for hyper-adapters.
    """

    attends: bool
    kinds: bool
    hyper: bool


def model_graph(base: BaseModel, first_layer: int, bits: Mapping[str, int], slots: Slots, *, is_tied: bool) -> str:
    """The graph in ONNX's textual syntax.

    Args:
        base: its sizes are used.
        first_layer: lowest layer with expert slots.
        bits: linear, as `linears` names it, or the head -> bits of its codes; empty where all weights are float32.
        slots: what can be fed.
        is_tied: the embedding is the head's table.
    """
    config, info = base.model.config, base.info
    num_kv_heads, head_size = config.num_key_value_heads, config.head_dim
    sizes = {name: (module.in_features, module.out_features) for name, module in linears(base, info.num_layers).items()}
    sizes[HEAD] = (info.width, info.vocab_size)
    places = {
        "num_layers": info.num_layers,
        "num_mixed": info.num_layers - first_layer,
        "num_kv_heads": num_kv_heads,
        "group": config.num_attention_heads // num_kv_heads,
        "head_size": head_size,
        "attention_width": config.num_attention_heads * head_size,
        "width": info.width,
        "vocab_size": info.vocab_size,
        "eps": config.rms_norm_eps,
        "attention_scale": head_size**-0.5,
        "rope_scale": float(base.model.model.rotary_emb.attention_scaling),
        "table": HEAD if is_tied else EMBEDDING,
    }

    def linear(name: str, x: str, out: str = "") -> str:
        wide, narrow = sizes[name]
        if name in bits:
            text = LINEAR.format(
                out=name, x=x, wide=wide, narrow=narrow, bits=bits[name], block=BLOCK, level=FLOAT_ACTIVATIONS
            )
        else:
            text = _FLOAT_LINEAR.format(out=name, x=x)
        return text.replace(f"{name} = ", f"{out or name} = ")

    def mixed(i: int, target: Target, x: str) -> str:
        name = f"l{i}_{target}"
        if i < first_layer or target not in targets:
            return linear(name, x)
        weights = f"l{i}_attention_weights" if target in ATTENTION_TARGETS else f"l{i}_weights"
        return linear(name, x, f"{name}_base") + _UPDATE.format(out=name, x=x, t=target, i=i, weights=weights)

    def routed(i: int, x: str, r: str) -> str:
        return route(i, x, r, kinds=slots.kinds) if i >= first_layer else ""

    def adapts(i: int) -> bool:
        return slots.hyper and i >= first_layer

    targets = TARGETS if slots.attends else FFN_TARGETS
    parts = [_START, START, KIND_START if slots.kinds else "", _EMBED_CODES if bits else _EMBED]
    parts.append("    hidden_0 = Reshape(embedded, flat_shape)\n")
    parts = [part.format(**places) for part in parts]
    for i in range(info.num_layers):
        parts += [
            layer_slots(i, i - first_layer, kinds=slots.kinds) if i >= first_layer else "",
            NORM.format(out=f"l{i}_attention_norm", x=f"hidden_{i}"),
            routed(i, f"l{i}_attention_norm", f"l{i}_attention") if slots.attends else "",
            *(mixed(i, target, f"l{i}_attention_norm") for target in ATTENTION_TARGETS[:3]),
            _ROTATE.format(x=f"l{i}_q", shape="query_shape"),
            _ROTATE.format(x=f"l{i}_k", shape="key_shape"),
            _ATTEND.format(i=i),
            mixed(i, "o", f"l{i}_context"),
            f"    l{i}_attended = Add(hidden_{i}, l{i}_o)\n",
            NORM.format(out=f"l{i}_ffn_norm", x=f"l{i}_attended"),
            routed(i, f"l{i}_ffn_norm", f"l{i}"),
            mixed(i, "gate", f"l{i}_ffn_norm"),
            mixed(i, "up", f"l{i}_ffn_norm"),
            ACTIVATE.format(i=i),
            mixed(i, "down", f"l{i}_ffn"),
            adapt(i, f"l{i}_ffn_norm", f"l{i}_hyper") if adapts(i) else "",
            f"    l{i}_written = Add(l{i}_down, l{i}_hyper)\n" if adapts(i) else "",
            f"    hidden_{i + 1} = Add(l{i}_attended, l{i}_{'written' if adapts(i) else 'down'})\n",
        ]
    parts.append(
        _END.format(
            keys=", ".join(f"l{i}_keys_out" for i in range(info.num_layers)),
            values=", ".join(f"l{i}_values_out" for i in range(info.num_layers)),
            norm=NORM.format(out="final_norm", x="kept_flat"),
            head=linear(HEAD, "final_norm"),
            num_layers=info.num_layers,
        )
    )
    if slots.kinds:
        parts.append(f"    entering = Reshape(hidden_{first_layer}, sequence_shape)\n")
    widths = {target: sizes[f"l0_{target}"] for target in targets}
    updates = ", ".join(
        _UPDATE_INPUTS.format(t=target, wide=wide, narrow=narrow, **places) for target, (wide, narrow) in widths.items()
    )
    fed = INPUTS + (KIND_INPUTS if slots.kinds else "") + (HYPER_INPUTS if slots.hyper else "")
    routing = fed.format(**places)
    inputs = _INPUTS.format(updates=updates, routing=routing, **places)
    outputs = _OUTPUTS.format(**places) + (_ENTERING.format(**places) if slots.kinds else "")
    return f"model ({inputs}) => ({outputs}) {{{''.join(parts)}}}"
