"""The four GPU kernels of the mixture op, in Triton: shrink and expand, each grouped by expert and for few tokens.

They know nothing of tensors' owners, devices or launching; `runtime.kernels.triton_plan` decides what is launched.
Read first: these are plain functions. `triton.jit` compiles them, Triton's interpreter runs them on a CPU; both read
this same source. Packed experts (`PackedUpdate`) have rows `rows[e] .. rows[e + 1]` of `a` [S, D] and `b` [S, H], the
scale multiplied into `b`. Pair `p = t * num_columns + k` is token t with its k-th expert. The shrunk intermediate `mid`
[P, splits, mid_stride] is float32, weighted by the router already; its splits are partial sums over D.
No two programs write the same place and nothing is accumulated atomically, so results do not depend on timing, and a
token's result in a kernel does not depend on the other tokens.
"""
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, ANN201, PLR0917 - Triton gives the parameters their types, and takes them by position

import triton.language as tl


def grouped_shrink(
    mid,
    x,
    a,
    rows,
    tiles,
    order,
    weights,
    num_columns,
    above_rank,
    up_to_rank,
    x_stride,
    mid_stride,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`mid[p, s, r] = weights[p] * sum_{d in span s} A[r, d] * x[t, d]` for the pairs of one tile, one expert.

    Grid: tiles, rank chunks of BLOCK_R, spans of D. Only experts with `above_rank < rank <= up_to_rank` are computed:
    one launch per rank bucket, so that a small rank is not padded to a large one. `tiles` [N, 3] holds expert, first
    and end position in `order`, which lists pairs by expert; expert -1 is an empty tile.
    """
    tile = tl.program_id(0)
    expert = tl.load(tiles + 3 * tile)
    if expert < 0:
        return
    first_row = tl.load(rows + expert)
    rank = tl.load(rows + expert + 1) - first_row
    first_rank = tl.program_id(1) * BLOCK_R
    if (rank <= above_rank) | (rank > up_to_rank) | (first_rank >= rank):
        return
    position = tl.load(tiles + 3 * tile + 1) + tl.arange(0, BLOCK_P)
    is_pair = position < tl.load(tiles + 3 * tile + 2)
    pair = tl.load(order + position, mask=is_pair, other=0)
    token = pair // num_columns
    r = first_rank + tl.arange(0, BLOCK_R)
    is_rank = r < rank
    split = tl.program_id(2)
    total = tl.full((BLOCK_P, BLOCK_R), 0.0, tl.float32)
    for begin in range(0, SPAN, BLOCK_D):
        d = split * SPAN + begin + tl.arange(0, BLOCK_D)
        is_d = d < WIDTH
        x_tile = tl.load(x + token[:, None] * x_stride + d[None, :], mask=is_pair[:, None] & is_d[None, :], other=0.0)
        a_rows = a + (first_row + r)[None, :] * WIDTH
        a_tile = tl.load(a_rows + d[:, None], mask=is_rank[None, :] & is_d[:, None], other=0.0)
        total = tl.dot(x_tile, a_tile, total, input_precision=PRECISION)
    weight = tl.load(weights + pair, mask=is_pair, other=0.0)
    place = mid + (pair * tl.num_programs(2) + split)[:, None] * mid_stride + r[None, :]
    tl.store(place, total * weight[:, None], mask=is_pair[:, None] & is_rank[None, :])


def grouped_expand(
    y,
    mid,
    b,
    rows,
    ids,
    token_order,
    tile_experts,
    num_tile_experts,
    num_tokens,
    num_columns,
    num_splits,
    max_tile_experts,
    y_stride,
    mid_stride,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`y[t, h] += sum_{p of t} sum_r mid[p, :, r] * B[r, h]` for a tile of tokens; summed in float32, added once.

    Grid: token tiles, blocks of H. `tile_experts` [M, max_tile_experts] lists the experts that a tile's tokens use,
    ascending; tokens that do not use one get zeros from it. The rank runs in steps of BLOCK_R up to the real rank.
    """
    tile = tl.program_id(0)
    position = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = position < num_tokens
    token = tl.load(token_order + position, mask=is_token, other=0)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_h = h < WIDTH
    total = tl.full((BLOCK_T, BLOCK_H), 0.0, tl.float32)
    for j in range(tl.load(num_tile_experts + tile)):
        expert = tl.load(tile_experts + tile * max_tile_experts + j)
        first_row = tl.load(rows + expert)
        rank = tl.load(rows + expert + 1) - first_row
        for first_rank in range(0, rank, BLOCK_R):
            r = first_rank + tl.arange(0, BLOCK_R)
            is_rank = r < rank
            shrunk = tl.full((BLOCK_T, BLOCK_R), 0.0, tl.float32)
            for k in range(num_columns):
                pair = token * num_columns + k
                uses = is_token & (tl.load(ids + pair, mask=is_token, other=-1) == expert)
                for split in range(num_splits):
                    place = mid + (pair * num_splits + split)[:, None] * mid_stride + r[None, :]
                    shrunk += tl.load(place, mask=uses[:, None] & is_rank[None, :], other=0.0)
            b_place = b + (first_row + r)[:, None] * WIDTH + h[None, :]
            b_tile = tl.load(b_place, mask=is_rank[:, None] & is_h[None, :], other=0.0).to(tl.float32)
            total = tl.dot(shrunk, b_tile, total, input_precision=PRECISION)
    place = y + token[:, None] * y_stride + h[None, :]
    is_place = is_token[:, None] & is_h[None, :]
    before = tl.load(place, mask=is_place, other=0.0).to(tl.float32)
    tl.store(place, (before + total).to(y.dtype.element_ty), mask=is_place)


def decode_shrink(
    mid,
    x,
    a,
    rows,
    ids,
    weights,
    num_columns,
    x_stride,
    mid_stride,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What `grouped_shrink` computes, for few tokens: one pair, BLOCK_R ranks and BLOCK_D columns per program.

    Grid: pairs, rank chunks, spans of D (BLOCK_D each). Products and sums in float32.
    """
    pair = tl.program_id(0)
    expert = tl.load(ids + pair)
    if expert < 0:
        return
    first_row = tl.load(rows + expert)
    rank = tl.load(rows + expert + 1) - first_row
    first_rank = tl.program_id(1) * BLOCK_R
    if first_rank >= rank:
        return
    split = tl.program_id(2)
    r = first_rank + tl.arange(0, BLOCK_R)
    is_rank = r < rank
    d = split * BLOCK_D + tl.arange(0, BLOCK_D)
    is_d = d < WIDTH
    x_row = tl.load(x + (pair // num_columns) * x_stride + d, mask=is_d, other=0.0).to(tl.float32)
    a_place = a + (first_row + r)[:, None] * WIDTH + d[None, :]
    a_tile = tl.load(a_place, mask=is_rank[:, None] & is_d[None, :], other=0.0).to(tl.float32)
    shrunk = tl.reduce(a_tile * x_row[None, :], 1, tl.standard._sum_combine)  # noqa: SLF001 - `tl.sum` is this
    place = mid + (pair * tl.num_programs(2) + split) * mid_stride + r
    tl.store(place, shrunk * tl.load(weights + pair), mask=is_rank)


def decode_expand(
    y,
    mid,
    b,
    rows,
    ids,
    num_columns,
    num_splits,
    y_stride,
    mid_stride,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """What `grouped_expand` computes, for few tokens: one token and BLOCK_H outputs per program.

    Grid: tokens, blocks of H. Products and sums in float32, added to `y` once.
    """
    token = tl.program_id(0)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_h = h < WIDTH
    total = tl.full((BLOCK_H,), 0.0, tl.float32)
    for k in range(num_columns):
        pair = token * num_columns + k
        expert = tl.load(ids + pair)
        if expert >= 0:
            first_row = tl.load(rows + expert)
            rank = tl.load(rows + expert + 1) - first_row
            for first_rank in range(0, rank, BLOCK_R):
                r = first_rank + tl.arange(0, BLOCK_R)
                is_rank = r < rank
                shrunk = tl.full((BLOCK_R,), 0.0, tl.float32)
                for split in range(num_splits):
                    shrunk += tl.load(mid + (pair * num_splits + split) * mid_stride + r, mask=is_rank, other=0.0)
                b_place = b + (first_row + r)[:, None] * WIDTH + h[None, :]
                b_tile = tl.load(b_place, mask=is_rank[:, None] & is_h[None, :], other=0.0).to(tl.float32)
                total += tl.reduce(shrunk[:, None] * b_tile, 0, tl.standard._sum_combine)  # noqa: SLF001
    place = y + token * y_stride + h
    before = tl.load(place, mask=is_h, other=0.0).to(tl.float32)
    tl.store(place, (before + total).to(y.dtype.element_ty), mask=is_h)
