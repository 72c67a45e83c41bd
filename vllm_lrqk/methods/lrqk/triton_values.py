"""What the values of unselected tokens add to attention over their pages' mean values: a part of a Triton kernel."""

import triton
import triton.language as tl


@triton.jit
def linear_values(
    residual,  # float32 [P] of a request's first query head
    moment,  # float32 [P, v] of a request's first query head
    value_projection,  # int8 or bfloat16 [num_pages, v, d], of one KV head
    value_scale,  # float32 [num_pages, v]
    key_factor_mean,  # float32 [num_pages, v]
    block_table,  # int32 [P], of one request
    start,
    shift,  # [GROUP_BLOCK], in powers of two
    projection_page_stride,
    column_page_stride,
    pages,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    DOT: tl.constexpr,
):
    """Sum over the TILE pages from `start` on, per head: 2^(residual - shift) times the deviation from the page's mean.

    The pages' columns follow each other as rows of one matrix: with weights in place of attention's, a product of
    [heads, TILE] and [TILE, d] takes TILE of them.
    """
    g, column = tl.arange(0, GROUP_BLOCK), tl.arange(0, HEAD_BLOCK)
    is_head, is_column = g < GROUP, column < HEAD_SIZE
    sums = tl.zeros([GROUP_BLOCK, HEAD_BLOCK], tl.float32)
    for first in range(start * COLUMNS, tl.minimum(start + TILE, pages) * COLUMNS, TILE):
        place = first + tl.arange(0, TILE)
        page, j = place // COLUMNS, place % COLUMNS
        is_asked = is_head[:, None] & (page < pages)[None, :]
        left_at = g[:, None] * pages + page[None, :]
        left = tl.load(residual + left_at, mask=is_asked, other=float("-inf")) * 1.4426950408889634
        is_page = tl.max(left, 0) > float("-inf")
        index = tl.load(block_table + page, mask=is_page, other=0).to(tl.int64)
        column_at = index * column_page_stride + j
        mean = tl.load(key_factor_mean + column_at, mask=is_page, other=0.0)
        scale = tl.load(value_scale + column_at, mask=is_page, other=0.0)
        factor_at = g[:, None] * pages * COLUMNS + place[None, :]
        factor = tl.load(moment + factor_at, mask=is_asked & is_page[None, :], other=0.0)
        weight = tl.exp2(left - shift[:, None]) * (factor - mean[None, :]) * scale[None, :]
        w_at = (index * projection_page_stride + j * HEAD_SIZE)[:, None] + column[None, :]
        w = tl.load(value_projection + w_at, mask=is_page[:, None] & is_column[None, :], other=0).to(DOT)
        sums += tl.dot(weight.to(DOT), w, input_precision="ieee")
    return sums
