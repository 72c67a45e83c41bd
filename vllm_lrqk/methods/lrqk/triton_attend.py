"""Flash-decode over rows at given addresses, with the residual of the other pages folded in: a Triton kernel.

The rows of one KV head are split over programs, each of which leaves its part: output, maximum and sum, which
`triton_parts.combine` merges. A part may come from any rows, or from the residual alone: rows that are still on their
way can follow later, and the residual need not wait for any. A program with one of them takes fewer registers.

Shapes: B requests, H query heads, KV kv heads, G = H / KV, d head size, R capacity for rows, P pages, v columns of key
factors that values follow.
"""

import os

import torch
import triton
import triton.language as tl

from vllm_lrqk.devices.triton_parts import Parts
from vllm_lrqk.methods.lrqk.format import FactorPages
from vllm_lrqk.methods.lrqk.triton_values import linear_values

LOG2E = 1.4426950408889634
ROWS_PER_TILE = 64
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit(do_not_specialize=["parts", "first_part"])
def _attend_kernel(
    query,  # [B, H, d]
    base,  # rows at `address`
    address,  # int64 [B, KV, R], bytes from base, multiples of 16; negative: no row
    residual,  # float32 [B, H, P]
    moment,  # float32 [B, H, P, v]
    value_mean,  # bfloat16 [num_pages, KV, d]
    value_projection,  # int8 or bfloat16 [num_pages, KV, v, d]
    value_scale,  # float32 [num_pages, KV, v]
    key_factor_mean,  # float32 [num_pages, KV, v]
    block_table,  # int32 [B, P]
    part_output,  # float32 [B * KV, parts, G, d]
    part_max,  # float32 [B * KV, parts, G], in powers of two
    part_sum,  # float32 [B * KV, parts, G]
    scale,
    query_request_stride,
    query_head_stride,
    mean_page_stride,
    mean_head_stride,
    projection_page_stride,
    projection_head_stride,
    column_page_stride,
    column_head_stride,
    table_stride,
    capacity,
    pages,
    parts,
    first_part,
    HAS_ROWS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    VALUE_RANK: tl.constexpr,  # 0: the pages' mean values alone
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    ROW_ITEM_BYTES: tl.constexpr,
    TILE: tl.constexpr,
    DOT: tl.constexpr,
    FACTOR_DOT: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    request, kv_head = item // KV_HEADS, item % KV_HEADS
    split, splits = tl.program_id(1), tl.num_programs(1)
    g, column = tl.arange(0, GROUP_BLOCK), tl.arange(0, HEAD_BLOCK)
    is_head, is_column = g < GROUP, column < HEAD_SIZE
    head = kv_head * GROUP + g
    q_at = request * query_request_stride + head[:, None] * query_head_stride + column[None, :]
    q = tl.load(query + q_at, mask=is_head[:, None] & is_column[None, :], other=0.0).to(DOT)
    highest = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    output = tl.zeros([GROUP_BLOCK, HEAD_BLOCK], tl.float32)

    if HAS_ROWS:
        share = tl.cdiv(tl.cdiv(capacity, TILE), splits) * TILE
        for start in range(split * share, tl.minimum((split + 1) * share, capacity), TILE):
            place = start + tl.arange(0, TILE)
            at = tl.load(address + item * capacity + place, mask=place < capacity, other=-1)
            if tl.max(at, 0) >= 0:
                is_row = at >= 0
                # Rows are aligned to 16 bytes; saying so lets the compiler read 16 bytes at once.
                row = base + (at // 16 * (16 // ROW_ITEM_BYTES))[:, None] + column[None, :]
                mask = is_row[:, None] & is_column[None, :]
                key = tl.load(row, mask=mask, other=0.0).to(DOT)
                value = tl.load(row + HEAD_SIZE, mask=mask, other=0.0).to(DOT)
                score = tl.dot(q, tl.trans(key), input_precision="ieee") * scale
                score = tl.where(is_row[None, :], score, float("-inf"))
                new = tl.maximum(highest, tl.max(score, 1))
                shift = tl.where(new == float("-inf"), 0.0, new)
                kept, weight = tl.exp2(highest - shift), tl.exp2(score - shift[:, None])
                total = total * kept + tl.sum(weight, 1)
                output = output * kept[:, None] + tl.dot(weight.to(DOT), value, input_precision="ieee")
                highest = new

    if HAS_RESIDUAL:
        page_share = tl.cdiv(tl.cdiv(pages, TILE), splits) * TILE
        for start in range(split * page_share, tl.minimum((split + 1) * page_share, pages), TILE):
            page = start + tl.arange(0, TILE)
            is_asked = is_head[:, None] & (page < pages)[None, :]
            left_at = (request * KV_HEADS * GROUP + head[:, None]) * pages + page[None, :]
            left = tl.load(residual + left_at, mask=is_asked, other=float("-inf")) * 1.4426950408889634
            best = tl.max(left, 0)
            if tl.max(best, 0) > float("-inf"):
                # A page without residual may be unsealed: its bytes mean nothing.
                is_page = best > float("-inf")
                index = tl.load(block_table + request * table_stride + page, mask=is_page, other=0).to(tl.int64)
                mean_at = index[:, None] * mean_page_stride + kv_head * mean_head_stride + column[None, :]
                is_read = is_page[:, None] & is_column[None, :]
                mean = tl.load(value_mean + mean_at, mask=is_read, other=0.0).to(DOT)
                new = tl.maximum(highest, tl.max(left, 1))
                shift = tl.where(new == float("-inf"), 0.0, new)
                kept, weight = tl.exp2(highest - shift), tl.exp2(left - shift[:, None])
                total = total * kept + tl.sum(weight, 1)
                output = output * kept[:, None] + tl.dot(weight.to(DOT), mean, input_precision="ieee")
                if VALUE_RANK > 0:
                    first_head = (request * KV_HEADS + kv_head) * GROUP
                    output += linear_values(
                        residual + first_head * pages,
                        moment + first_head * pages * VALUE_RANK,
                        value_projection + kv_head * projection_head_stride,
                        value_scale + kv_head * column_head_stride,
                        key_factor_mean + kv_head * column_head_stride,
                        block_table + request * table_stride,
                        start,
                        shift,
                        projection_page_stride,
                        column_page_stride,
                        pages,
                        GROUP,
                        GROUP_BLOCK,
                        HEAD_SIZE,
                        HEAD_BLOCK,
                        VALUE_RANK,
                        TILE,
                        FACTOR_DOT,
                    )
                highest = new

    part = (item * parts + first_part + split) * GROUP + g
    tl.store(part_max + part, highest, mask=is_head)
    tl.store(part_sum + part, total, mask=is_head)
    part_at = part[:, None] * HEAD_SIZE + column[None, :]
    tl.store(part_output + part_at, output, mask=is_head[:, None] & is_column[None, :])


def num_splits(items: int, capacity: int, multiprocessors: int) -> int:
    """Programs per (request, KV head): enough to fill the device twice, none of them without a tile."""
    return max(1, min(-(-2 * multiprocessors // max(items, 1)), -(-capacity // ROWS_PER_TILE)))


def attend_rows(
    query: torch.Tensor,
    base: torch.Tensor,
    address: torch.Tensor | None,
    scale: float,
    parts: Parts,
    first_part: int,
    splits: int,
    residual: torch.Tensor | None = None,
    factors: FactorPages | None = None,
    block_table: torch.Tensor | None = None,
    moment: torch.Tensor | None = None,
) -> None:
    """Attend to rows or to the residual of pages, or to both; fills `splits` parts from `first_part` on.

    Args:
        query: [B, H, d].
        base: memory of the rows, whose first element has address 0; the row's elements are of its dtype.
        address: int64 [B, KV, R], bytes, multiples of 16; a row is its key followed by its value; negative: no row.
            None: the residual alone.
        residual: float32 [B, H, P], see `Selection`; needs factors and block_table int32 [B, P].
        moment: float32 [B, H, P, v], see `Selection`; needs residual, and factors with linear values.
    """
    requests, heads, head_size = query.shape
    kv_heads = parts.output.shape[0] // requests
    group = heads // kv_heads
    has_residual = residual is not None and factors is not None and block_table is not None
    # Triton's interpreter multiplies the bits of bfloat16.
    dot = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(base.dtype, tl.float32)
    if IS_INTERPRETED:
        dot = tl.float32
    # Projections may lie beyond what float16 can hold.
    factor_dot = tl.bfloat16 if dot == tl.float16 else dot
    mean = factors.value_mean if factors is not None and has_residual else query
    projection = scale_of_column = mean_of_column = query
    if factors is not None and has_residual and moment is not None:
        projection = factors.value_projection
        scale_of_column, mean_of_column = factors.value_scale, factors.key_factor_mean
    _attend_kernel[(requests * kv_heads, splits)](
        query,
        base,
        query if address is None else address,
        residual if has_residual else query,
        moment if moment is not None else query,
        mean,
        projection,
        scale_of_column,
        mean_of_column,
        block_table if has_residual else query,
        parts.output,
        parts.highest,
        parts.sums,
        scale * LOG2E,
        query.stride(0),
        query.stride(1),
        *mean.stride()[:2],
        *projection.stride()[:2],
        *scale_of_column.stride()[:2],
        block_table.stride(0) if block_table is not None else 0,
        0 if address is None else address.shape[2],
        residual.shape[2] if residual is not None else 0,
        parts.output.shape[1],
        first_part,
        HAS_ROWS=address is not None,
        HAS_RESIDUAL=has_residual,
        VALUE_RANK=moment.shape[3] if moment is not None else 0,
        KV_HEADS=kv_heads,
        GROUP=group,
        GROUP_BLOCK=max(16, triton.next_power_of_2(group)),
        HEAD_SIZE=head_size,
        HEAD_BLOCK=max(16, triton.next_power_of_2(head_size)),
        ROW_ITEM_BYTES=base.element_size(),
        TILE=ROWS_PER_TILE,
        DOT=dot,
        FACTOR_DOT=factor_dot,
        num_warps=4,
    )
