"""The routing inside `onnx-model`, as text: from what enters a linear to the weight of every column for every token.

It does not know the rest of the graph, only its constants `second`, `last`, `last_two`, `never`, `nothing`,
`sequence_shape`, `columns_shape` and what `START` adds.
Read first: top-k is always there; the kinds beside it (Arrow, grouped, weights that are fixed for a prompt) have inputs
of their own and are there only where a generation has such a task. Each kind weighs its own columns, and all are added.
"""

from __future__ import annotations

INPUTS = """
    float[{num_mixed}, C, {width}] router, bool[{num_mixed}, B, C] allowed, int64[B] top_k,
"""

KIND_INPUTS = """
    bool[{num_mixed}, C] absolute, float[{num_mixed}, C] router_bias, float[{num_mixed}, B, C] constant,
    float[{num_mixed}, G, {width}] group_router, float[{num_mixed}, G] group_bias,
    bool[{num_mixed}, B, G] open_groups, bool[{num_mixed}, G, C] members, float[B] share, float[B] epsilon,
"""

START = """
    num_columns = Shape<start = 2, end = 3>(allowed)
    columns_shape = Concat<axis = 0>(last, num_columns)
    largest_k = ReduceMax<keepdims = 1>(top_k)
    k_max = Min(largest_k, num_columns)
    k_max_scalar = Squeeze(k_max)
    ranks = Range(zero, k_max_scalar, one)
    k_of_sequence = Unsqueeze(top_k, last_two)
    is_beyond_k = GreaterOrEqual(ranks, k_of_sequence)
"""

KIND_START = """
    num_groups = Shape<start = 2, end = 3>(open_groups)
    group_shape = Concat<axis = 0>(last, num_groups, second)
    share_columns = Unsqueeze(share, last_two)
    epsilon_columns = Unsqueeze(epsilon, last_two)
"""

_LAYER = """
    l{i}_slot = Constant<value_int = {slot}>()
    l{i}_router = Gather<axis = 0>(router, l{i}_slot)
    l{i}_allowed_columns = Gather<axis = 0>(allowed, l{i}_slot)
    l{i}_allowed = Unsqueeze(l{i}_allowed_columns, second)
"""

_KIND_LAYER = """
    l{i}_absolute = Gather<axis = 0>(absolute, l{i}_slot)
    l{i}_router_bias = Gather<axis = 0>(router_bias, l{i}_slot)
    l{i}_constant_rows = Gather<axis = 0>(constant, l{i}_slot)
    l{i}_constant = Unsqueeze(l{i}_constant_rows, second)
    l{i}_group_router = Gather<axis = 0>(group_router, l{i}_slot)
    l{i}_group_bias = Gather<axis = 0>(group_bias, l{i}_slot)
    l{i}_open_rows = Gather<axis = 0>(open_groups, l{i}_slot)
    l{i}_open = Unsqueeze(l{i}_open_rows, second)
    l{i}_members = Gather<axis = 0>(members, l{i}_slot)
"""

_SCORES = """
    {r}_scores = Gemm<transB = 1>({x}, l{i}_router)
"""

_KIND_SCORES = """
    {r}_logits = Gemm<transB = 1>({x}, l{i}_router, l{i}_router_bias)
    {r}_absolute_logits = Abs({r}_logits)
    {r}_scores = Where(l{i}_absolute, {r}_absolute_logits, {r}_logits)
"""

_TOP_K = """
    {r}_sequence_scores = Reshape({r}_scores, sequence_shape)
    {r}_own_scores = Where(l{i}_allowed, {r}_sequence_scores, never)
    {r}_best, {r}_columns = TopK<axis = -1>({r}_own_scores, k_max)
    {r}_chosen = Where(is_beyond_k, never, {r}_best)
    {r}_probabilities = Softmax<axis = -1>({r}_chosen)
    {r}_is_real = Greater({r}_chosen, never)
    {r}_kept = Where({r}_is_real, {r}_probabilities, nothing)
    {r}_weights_shape = Shape({r}_sequence_scores)
    {r}_no_weights = ConstantOfShape<value = float[1] {{0.0}}>({r}_weights_shape)
    {r}_scattered = ScatterElements<axis = 2>({r}_no_weights, {r}_columns, {r}_kept)
"""

_FLAT = """
    {r}_weights = Reshape({r}_scattered, columns_shape)
"""

_KIND_FLAT = """
    {r}_group_products = Gemm<transB = 1>({x}, l{i}_group_router, l{i}_group_bias)
    {r}_group_logits = Reshape({r}_group_products, sequence_shape)
    {r}_open_logits = Where(l{i}_open, {r}_group_logits, never)
    {r}_group_softmax = Softmax<axis = -1>({r}_open_logits)
    {r}_is_large = GreaterOrEqual({r}_group_softmax, epsilon_columns)
    {r}_is_used = And(l{i}_open, {r}_is_large)
    {r}_groups = Where({r}_is_used, {r}_group_softmax, nothing)
    {r}_shared = Mul({r}_groups, share_columns)
    {r}_group_columns = Reshape({r}_shared, group_shape)
    {r}_logit_rows = Unsqueeze({r}_logits, second)
    {r}_member_logits = Where(l{i}_members, {r}_logit_rows, never)
    {r}_member_softmax = Softmax<axis = 2>({r}_member_logits)
    {r}_within = Where(l{i}_members, {r}_member_softmax, nothing)
    {r}_terms = Mul({r}_group_columns, {r}_within)
    {r}_grouped_flat = ReduceSum<keepdims = 0>({r}_terms, second)
    {r}_grouped = Reshape({r}_grouped_flat, sequence_shape)
    {r}_chosen_or_grouped = Add({r}_scattered, {r}_grouped)
    {r}_all_weights = Add({r}_chosen_or_grouped, l{i}_constant)
    {r}_weights = Reshape({r}_all_weights, columns_shape)
"""


def layer_slots(i: int, slot: int, *, kinds: bool) -> str:
    """What the routing of layer `i` reads of the inputs, at `slot` of their first dimension."""
    return (_LAYER + (_KIND_LAYER if kinds else "")).format(i=i, slot=slot)


def route(i: int, x: str, r: str, *, kinds: bool) -> str:
    """Weights `{r}_weights` [B*T, C] of the columns of layer `i` for the tokens `x` [B*T, D]."""
    parts = (_KIND_SCORES, _TOP_K, _KIND_FLAT) if kinds else (_SCORES, _TOP_K, _FLAT)
    return "".join(parts).format(i=i, x=x, r=r)
