"""The hyper-adapters inside `onnx-model`, as text: from the experts that a token chose to what its adapter adds.

It does not know how adapters are made (`exporters.hyper_inputs` feeds one per set of experts), nor the rest of the
graph, only its constants `second` and `nothing`.
Read first: a token's set is found by counting. A set of s experts of which the token chose c, among n in all, is its
own where c = s and c = n. Each token gets the adapter of one set, or of none where it chose nothing.
"""

from __future__ import annotations

INPUTS = """
    bool[{num_mixed}, H, C] hyper_sets, float[{num_mixed}, S_hyper, {width}] hyper_down,
    float[{num_mixed}, S_hyper] hyper_down_bias, float[{num_mixed}, S_hyper, {width}] hyper_up,
    float[{num_mixed}, H, {width}] hyper_up_bias, float[{num_mixed}, H, S_hyper] hyper_spread,
"""

_ADAPT = """
    {r}_sets_bool = Gather<axis = 0>(hyper_sets, l{i}_slot)
    {r}_sets = Cast<to = 1>({r}_sets_bool)
    {r}_set_sizes = ReduceSum<keepdims = 0>({r}_sets, second)
    {r}_is_chosen = Greater(l{i}_weights, nothing)
    {r}_chosen = Cast<to = 1>({r}_is_chosen)
    {r}_num_chosen = ReduceSum<keepdims = 1>({r}_chosen, second)
    {r}_num_common = Gemm<transB = 1>({r}_chosen, {r}_sets)
    {r}_holds_set = Equal({r}_num_common, {r}_set_sizes)
    {r}_is_in_set = Equal({r}_num_common, {r}_num_chosen)
    {r}_is_own_bool = And({r}_holds_set, {r}_is_in_set)
    {r}_is_own = Cast<to = 1>({r}_is_own_bool)
    {r}_down = Gather<axis = 0>(hyper_down, l{i}_slot)
    {r}_down_bias = Gather<axis = 0>(hyper_down_bias, l{i}_slot)
    {r}_up = Gather<axis = 0>(hyper_up, l{i}_slot)
    {r}_up_bias = Gather<axis = 0>(hyper_up_bias, l{i}_slot)
    {r}_spread = Gather<axis = 0>(hyper_spread, l{i}_slot)
    {r}_inner = Gemm<transB = 1>({x}, {r}_down, {r}_down_bias)
    {r}_active = Relu({r}_inner)
    {r}_own_rows = MatMul({r}_is_own, {r}_spread)
    {r}_own_active = Mul({r}_active, {r}_own_rows)
    {r}_of_rows = MatMul({r}_own_active, {r}_up)
    {r}_of_bias = MatMul({r}_is_own, {r}_up_bias)
    {r} = Add({r}_of_rows, {r}_of_bias)
"""


def adapt(i: int, x: str, r: str) -> str:
    """`{r}` [B*T, D]: what the adapters of layer `i` add to its FFN's output, whose input is `x` [B*T, D]."""
    return _ADAPT.format(i=i, x=x, r=r)
