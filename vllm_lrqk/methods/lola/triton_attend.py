"""Attention over window, cache and state in one pass: a Triton kernel.

A program serves some tokens of one (request, KV head), with their query heads as rows, and a part of the memory's rows;
the first part takes the state in as well. `triton_parts.combine` merges the parts.

Hardly run on a GPU yet (docs/lola.md): tested with Triton's interpreter.
"""

import os

import torch
import triton
import triton.language as tl

from vllm_lrqk.devices.triton_parts import Parts
from vllm_lrqk.methods.lola.attention import Rules
from vllm_lrqk.methods.lola.format import Memory
from vllm_lrqk.methods.lola.state import SlopeState
from vllm_lrqk.methods.lola.triton_advance import row_offset

LOG2E = 1.4426950408889634
TILE = 64
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit(do_not_specialize=["first_seen", "tokens"])
def _attend_kernel(
    query,  # [tokens of all requests, H, d]
    seq_lens,  # int32 [B]: decode; None: one request whose first new token is number `first_seen`
    first_seen,
    tokens,  # new tokens per request, all of one span
    blocks,  # int32 [B]
    rows,  # the ring's rows, [num_blocks, KV, ...] in the model's dtype
    key_mean,  # float32 [num_blocks, KV, d]
    value_mean,
    cross_moment,  # float32 [num_blocks, KV, r, d]
    directions,  # float32 [KV, r, d], of queries
    part_output,  # float32 [tokens * KV, parts, G, d]
    part_max,  # float32 [tokens * KV, parts, G], in powers of two
    part_sum,
    query_token_stride,
    query_head_stride,
    blocks_stride,
    row_block_stride,  # elements of the model's dtype
    row_head_stride,
    sum_block_stride,  # elements of 4 bytes
    sum_head_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,  # rows of queries
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CACHE: tl.constexpr,
    CACHE_SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    DOT: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    request, head = item // KV_HEADS, item % KV_HEADS
    split, splits = tl.program_id(1), tl.num_programs(1)
    ring_rows: tl.constexpr = WINDOW + CHUNK
    if seq_lens is None:  # noqa: SIM108
        seen = first_seen
    else:
        seen = tl.load(seq_lens + request)
    m, column = tl.arange(0, M), tl.arange(0, D)
    t = tl.program_id(2) * (M // GROUP) + m // GROUP
    is_query = (m // GROUP < M // GROUP) & (t < tokens)
    is_column = column < HEAD_SIZE
    highest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    output = tl.zeros([M, D], tl.float32)

    if seen > 0:
        block = tl.load(blocks + request * blocks_stride).to(tl.int64)
        rows += block * row_block_stride + head * row_head_stride
        sums = block * sum_block_stride + head * sum_head_stride
        updates = tl.maximum(seen - ring_rows + CHUNK - 1, 0) // CHUNK
        cached = tl.minimum(CACHE, updates * CHUNK)
        folded = updates * CHUNK - cached
        first = updates * CHUNK
        last = cached + seen - 1 + t - first  # the row of each query's own token
        count = tl.max(tl.where(is_query, last, -1), 0) + 1
        q_at = (request * tokens + t)[:, None] * query_token_stride
        q_at += (head * GROUP + m % GROUP)[:, None] * query_head_stride + column[None, :]
        q = tl.load(query + q_at, mask=is_query[:, None] & is_column[None, :], other=0.0)
        share = tl.cdiv(tl.cdiv(count, ROWS), splits) * ROWS
        for start in range(split * share, tl.minimum((split + 1) * share, count), ROWS):
            i = start + tl.arange(0, ROWS)
            mask = (i < count)[:, None] & is_column[None, :]
            at = row_offset(i, cached, first, ring_rows, CACHE_SHIFT, HEAD_SIZE)[:, None] + column[None, :]
            key = tl.load(rows + at, mask=mask, other=0.0).to(DOT)
            value = tl.load(rows + at + HEAD_SIZE, mask=mask, other=0.0).to(DOT)
            score = tl.dot(q.to(DOT), tl.trans(key), input_precision="ieee") * scale
            score = tl.where(i[None, :] <= last[:, None], score, float("-inf"))
            new = tl.maximum(highest, tl.max(score, 1))
            shift = tl.where(new == float("-inf"), 0.0, new)
            rescale, weight = tl.exp2(highest - shift), tl.exp2(score - shift[:, None])
            total = total * rescale + tl.sum(weight, 1)
            output = output * rescale[:, None] + tl.dot(weight.to(DOT), value, input_precision="ieee")
            highest = new
        if RANK > 0:  # noqa: SIM102
            if (folded > 0) & (split == 0):
                x = q.to(tl.float32) * scale
                row_r = tl.arange(0, R)
                matrix_at = row_r[:, None] * HEAD_SIZE + column[None, :]
                is_matrix = (row_r < RANK)[:, None] & is_column[None, :]
                mean_k = tl.load(key_mean + sums + column, mask=is_column, other=0.0)
                mean_v = tl.load(value_mean + sums + column, mask=is_column, other=0.0)
                cross = tl.load(cross_moment + sums + matrix_at, mask=is_matrix, other=0.0)
                direction = tl.load(directions + head * RANK * HEAD_SIZE + matrix_at, mask=is_matrix, other=0.0)
                mass = tl.log2(folded.to(tl.float32)) + tl.sum(x * mean_k[None, :], 1)
                # Scores are in powers of two; the slope wants them natural.
                projected = tl.dot(x, tl.trans(direction), input_precision="ieee") * (
                    0.6931471805599453 / folded.to(tl.float32)
                )
                mean = mean_v[None, :] + tl.dot(projected, cross, input_precision="ieee")
                new = tl.maximum(highest, mass)
                rescale, weight = tl.exp2(highest - new), tl.exp2(mass - new)
                total = total * rescale + weight
                output = output * rescale[:, None] + weight[:, None] * mean
                highest = new

    part = (((request * tokens + t) * KV_HEADS + head) * splits + split) * GROUP + m % GROUP
    tl.store(part_max + part, highest, mask=is_query)
    tl.store(part_sum + part, total, mask=is_query)
    tl.store(
        part_output + part[:, None] * HEAD_SIZE + column[None, :],
        output,
        mask=is_query[:, None] & is_column[None, :],
    )


def query_rows(dtype: torch.dtype) -> int:
    """Tokens times query heads that one program of a prefill takes."""
    return 128 // dtype.itemsize


def attend(
    query: torch.Tensor,
    memory: Memory,
    blocks: torch.Tensor,
    seq_lens: torch.Tensor | None,
    first_seen: int,
    rules: Rules,
    parts: Parts,
) -> None:
    """Attend tokens whose rows `advance` has written; fills all of `parts`.

    Args:
        query: [B, H, d], one token of each request; or [T, H, d], tokens of one span of one request.
        blocks: int32 [B]; or [1].
        seq_lens: int32 [B], the new token included, 0 for padding; None for one request.
        first_seen: for one request, its number of tokens with the first of these.
    """
    settings, (_, num_heads, head_size) = rules.settings, query.shape
    requests, tokens = (len(query), 1) if seq_lens is not None else (1, len(query))
    group = num_heads // memory.heads
    slope = rules.state if isinstance(rules.state, SlopeState) else None
    rank = settings.state_rank if slope is not None else 0
    sums = memory.sums or dict.fromkeys(("key_mean", "value_mean", "cross_moment"), memory.positions)
    layout = memory.format
    dot = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(query.dtype, tl.float32)
    if IS_INTERPRETED:  # the interpreter multiplies the bits of bfloat16
        dot = tl.float32
    queries = max(16, triton.next_power_of_2(group), query_rows(query.dtype) if tokens > 1 else 1)
    grid = (requests * memory.heads, parts.output.shape[1], triton.cdiv(tokens, queries // group))
    _attend_kernel[grid](
        query,
        seq_lens,
        first_seen,
        tokens,
        blocks,
        memory.ring,
        sums["key_mean"],
        sums["value_mean"],
        sums["cross_moment"],
        slope.directions.query if slope is not None else memory.positions,
        parts.output,
        parts.highest,
        parts.sums,
        query.stride(0),
        query.stride(1),
        blocks.stride(0),
        memory.ring.stride(0),
        memory.ring.stride(1),
        memory.positions.stride(0),
        memory.positions.stride(1),
        rules.scale * LOG2E,
        KV_HEADS=memory.heads,
        GROUP=group,
        M=queries,
        HEAD_SIZE=head_size,
        D=max(16, triton.next_power_of_2(head_size)),
        RANK=rank,
        R=max(16, triton.next_power_of_2(rank)),
        WINDOW=settings.window,
        CHUNK=settings.chunk,
        CACHE=settings.cache,
        CACHE_SHIFT=(layout.cache_offset - layout.ring_offset) // layout.dtype.itemsize,
        ROWS=TILE if query.element_size() == 2 else TILE // 2,
        DOT=dot,
        num_warps=4,
    )
