"""Taking tokens into a request's memory: a Triton kernel for one update, if it is due, and the new rows.

A program serves one (request, KV head). Where no chunk has to leave it only writes the new rows, so a captured step
launches it every time. The formulas are those of `attention.update`, `SlopeState.fold` and `SlopeState.recall`.

Hardly run on a GPU yet (docs/lola.md): tested with Triton's interpreter, and compiled for the architectures that
tests/support names.
"""

import torch
import triton
import triton.language as tl

from vllm_lrqk.methods.lola.attention import Rules
from vllm_lrqk.methods.lola.format import Memory
from vllm_lrqk.methods.lola.state import LEAST_VARIANCE, RIDGE, SlopeState


@triton.jit
def row_offset(i, cached, first, RING: tl.constexpr, CACHE_SHIFT: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """Elements from the ring's first to row i: the cache comes first, then the window from position `first` on."""
    in_cache = CACHE_SHIFT + i * 2 * HEAD_SIZE
    return tl.where(i < cached, in_cache, (first + i - cached) % RING * 2 * HEAD_SIZE)


@triton.jit
def _regression(cross, second, folded, ridge, least_variance, RANK: tl.constexpr, R: tl.constexpr, i, j):
    """(second / n + ridge)^-1 cross / n by Gauss-Jordan elimination; the matrix is positive definite."""
    inverse = 1.0 / folded
    diagonal = tl.sum(tl.sum(tl.where(i[:, None] == j[None, :], second, 0.0), 1), 0) * inverse
    ridge = ridge * diagonal / RANK + least_variance
    # Rows that only pad the matrix are those of the identity.
    own = tl.where(i < RANK, ridge, 1.0)
    a = second * inverse + tl.where(i[:, None] == j[None, :], own[:, None], 0.0)
    b = cross * inverse
    for step in range(RANK):
        row_a = tl.sum(tl.where((i == step)[:, None], a, 0.0), 0)
        row_b = tl.sum(tl.where((i == step)[:, None], b, 0.0), 0)
        pivot = tl.sum(tl.where(j == step, row_a, 0.0), 0)
        factor = tl.sum(tl.where((j == step)[None, :], a, 0.0), 1)
        factor = tl.where(i == step, pivot - 1.0, factor) / pivot
        a -= factor[:, None] * row_a[None, :]
        b -= factor[:, None] * row_b[None, :]
    return b


@triton.jit
def _random_score(position, head):
    """`attention.random_scores`."""
    x = position.to(tl.uint32) + head.to(tl.uint32) * 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    return (x >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit(do_not_specialize=["first_seen", "tokens"])
def _advance_kernel(
    key,  # [tokens of all requests, KV, d]
    value,
    seq_lens,  # int32 [B]: decode; None: one request whose first new token is number `first_seen`
    first_seen,
    tokens,  # new tokens per request
    blocks,  # int32 [B]
    rows,  # the ring's rows, [num_blocks, KV, ...] in the model's dtype
    positions,  # int32 [num_blocks, KV, L]
    key_mean,  # float32 [num_blocks, KV, d]
    value_mean,
    cross_moment,  # float32 [num_blocks, KV, r, d]
    second_moment,  # float32 [num_blocks, KV, r, r]
    directions,  # float32 [KV, r, d], of keys
    scores,  # float32 [B * KV, N]: working memory
    targets,  # int32 [B * KV, N]: working memory
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    blocks_stride,
    row_block_stride,  # elements of the model's dtype
    row_head_stride,
    sum_block_stride,  # elements of 4 bytes
    sum_head_stride,
    ridge,
    least_variance,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,  # rounded up to a power of two
    RANK: tl.constexpr,  # 0: no state
    R: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CACHE: tl.constexpr,
    SINKS: tl.constexpr,
    IS_RANDOM: tl.constexpr,
    CACHE_SHIFT: tl.constexpr,  # elements from the ring to the cache
    N: tl.constexpr,  # CACHE + CHUNK, rounded up to a power of two
    ROWS: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    request, head = item // KV_HEADS, item % KV_HEADS
    ring_rows: tl.constexpr = WINDOW + CHUNK
    if seq_lens is None:  # noqa: SIM108
        seen = first_seen
    else:
        seen = tl.load(seq_lens + request)
    if seen <= 0:
        return
    block = tl.load(blocks + request * blocks_stride).to(tl.int64)
    rows += block * row_block_stride + head * row_head_stride
    sums = block * sum_block_stride + head * sum_head_stride
    positions += sums
    column, column_r, row_r = tl.arange(0, D), tl.arange(0, R), tl.arange(0, R)
    is_column = column < HEAD_SIZE

    before = tl.maximum(seen - 1 - ring_rows + CHUNK - 1, 0) // CHUNK
    if tl.maximum(seen - ring_rows + CHUNK - 1, 0) // CHUNK > before:
        cached = tl.minimum(CACHE, before * CHUNK)
        keep = tl.minimum(CACHE, (before + 1) * CHUNK)
        folded = before * CHUNK - cached
        first = before * CHUNK
        count = cached + CHUNK
        scores += item * N
        targets += item * N
        n = tl.arange(0, N)
        if keep == count:
            tl.store(targets + n, tl.where(n < count, n, -1))
        else:
            is_matrix = (row_r < RANK)[:, None] & is_column[None, :]
            mean_k = tl.zeros([D], tl.float32)
            mean_v = tl.zeros([D], tl.float32)
            old_cross = tl.zeros([R, D], tl.float32)
            old_second = tl.zeros([R, R], tl.float32)
            direction = tl.zeros([R, D], tl.float32)
            matrix_at = row_r[:, None] * HEAD_SIZE + column[None, :]
            square_at = row_r[:, None] * RANK + column_r[None, :]
            is_square = (row_r < RANK)[:, None] & (column_r < RANK)[None, :]
            if RANK > 0:
                direction = tl.load(directions + head * RANK * HEAD_SIZE + matrix_at, mask=is_matrix, other=0.0)
                if folded > 0:
                    mean_k = tl.load(key_mean + sums + column, mask=is_column, other=0.0)
                    mean_v = tl.load(value_mean + sums + column, mask=is_column, other=0.0)
                    old_cross = tl.load(cross_moment + sums + matrix_at, mask=is_matrix, other=0.0)
                    old_second = tl.load(second_moment + sums + square_at, mask=is_square, other=0.0)
            regression = tl.zeros([R, D], tl.float32)
            if RANK > 0:  # noqa: SIM102
                if folded > 0:
                    regression = _regression(
                        old_cross, old_second, folded.to(tl.float32), ridge, least_variance, RANK, R, row_r, column_r
                    )
            # What no candidate has, so that it is never kept.
            tl.store(scores + n, tl.full([N], -1.0, tl.float32))
            tl.debug_barrier()
            for start in range(0, count, ROWS):
                i = start + tl.arange(0, ROWS)
                is_row = i < count
                mask = is_row[:, None] & is_column[None, :]
                at = row_offset(i, cached, first, ring_rows, CACHE_SHIFT, HEAD_SIZE)[:, None] + column[None, :]
                old = tl.load(positions + i, mask=i < cached, other=0)
                position = tl.where(i < cached, old, first + i - cached)
                if IS_RANDOM:
                    score = _random_score(position, head)
                else:
                    v = tl.load(rows + at + HEAD_SIZE, mask=mask, other=0.0).to(tl.float32) - mean_v[None, :]
                    if RANK > 0:  # noqa: SIM102
                        if folded > 0:
                            k = tl.load(rows + at, mask=mask, other=0.0).to(tl.float32) - mean_k[None, :]
                            projected = tl.dot(k, tl.trans(direction), input_precision="ieee")
                            v -= tl.dot(projected, regression, input_precision="ieee")
                    v = tl.where(mask, v, 0.0)
                    score = tl.sum(v * v, 1)
                score = tl.where(score == score, score, float("inf"))
                score = tl.where(position < SINKS, float("inf"), score)
                tl.store(scores + i, score, mask=is_row)
            tl.debug_barrier()
            # A candidate stays if fewer than `keep` others are better, or equal and older.
            own = tl.load(scores + n)
            better = tl.zeros([N], tl.int32)
            for start in range(0, count, ROWS):
                i = start + tl.arange(0, ROWS)
                other = tl.load(scores + i, mask=i < count, other=-1.0)
                is_better = (other[None, :] > own[:, None]) | (
                    (other[None, :] == own[:, None]) & (i[None, :] < n[:, None])
                )
                better += tl.sum((is_better & (i < count)[None, :]).to(tl.int32), 1)
            stays = ((better < keep) & (n < count)).to(tl.int32)
            tl.store(targets + n, tl.where(stays > 0, tl.cumsum(stays, 0) - 1, -1))
            tl.debug_barrier()
            if RANK > 0:
                rest = (count - keep).to(tl.float32)
                total_k = tl.zeros([D], tl.float32)
                total_v = tl.zeros([D], tl.float32)
                for start in range(0, count, ROWS):
                    i = start + tl.arange(0, ROWS)
                    leaves = tl.load(targets + i, mask=i < count, other=0) < 0
                    at = row_offset(i, cached, first, ring_rows, CACHE_SHIFT, HEAD_SIZE)[:, None] + column[None, :]
                    mask = leaves[:, None] & is_column[None, :]
                    total_k += tl.sum(tl.load(rows + at, mask=mask, other=0.0).to(tl.float32), 0)
                    total_v += tl.sum(tl.load(rows + at + HEAD_SIZE, mask=mask, other=0.0).to(tl.float32), 0)
                new_k, new_v = total_k / rest, total_v / rest
                cross = tl.zeros([R, D], tl.float32)
                second = tl.zeros([R, R], tl.float32)
                for start in range(0, count, ROWS):
                    i = start + tl.arange(0, ROWS)
                    leaves = tl.load(targets + i, mask=i < count, other=0) < 0
                    at = row_offset(i, cached, first, ring_rows, CACHE_SHIFT, HEAD_SIZE)[:, None] + column[None, :]
                    mask = leaves[:, None] & is_column[None, :]
                    k = tl.load(rows + at, mask=mask, other=0.0).to(tl.float32) - new_k[None, :]
                    v = tl.load(rows + at + HEAD_SIZE, mask=mask, other=0.0).to(tl.float32) - new_v[None, :]
                    k, v = tl.where(mask, k, 0.0), tl.where(mask, v, 0.0)
                    projected = tl.dot(k, tl.trans(direction), input_precision="ieee")
                    cross += tl.dot(tl.trans(projected), v, input_precision="ieee")
                    second += tl.dot(tl.trans(projected), projected, input_precision="ieee")
                share = rest / (folded.to(tl.float32) + rest)
                weight = folded.to(tl.float32) * share
                step_k = tl.where(folded > 0, new_k - mean_k, 0.0)
                step_v = tl.where(folded > 0, new_v - mean_v, 0.0)
                step = tl.sum(direction * step_k[None, :], 1)  # [R]
                # As a row too: the same numbers along the other dimension.
                step_row = tl.sum(tl.where(row_r[:, None] == column_r[None, :], step[:, None], 0.0), 0)
                cross += old_cross + weight * step[:, None] * step_v[None, :]
                second += old_second + weight * step[:, None] * step_row[None, :]
                tl.store(cross_moment + sums + matrix_at, cross, mask=is_matrix)
                tl.store(second_moment + sums + square_at, second, mask=is_square)
                k = tl.where(folded > 0, mean_k + share * step_k, new_k)
                v = tl.where(folded > 0, mean_v + share * step_v, new_v)
                tl.store(key_mean + sums + column, k, mask=is_column)
                tl.store(value_mean + sums + column, v, mask=is_column)
        tl.debug_barrier()
        # Rows only move to the front: a tile writes over nothing that a later tile reads.
        for start in range(0, count, ROWS):
            i = start + tl.arange(0, ROWS)
            target = tl.load(targets + i, mask=i < count, other=-1)
            stays = target >= 0
            at = row_offset(i, cached, first, ring_rows, CACHE_SHIFT, HEAD_SIZE)[:, None] + column[None, :]
            mask = stays[:, None] & is_column[None, :]
            k = tl.load(rows + at, mask=mask)
            v = tl.load(rows + at + HEAD_SIZE, mask=mask)
            old = tl.load(positions + i, mask=stays & (i < cached), other=0)
            position = tl.where(i < cached, old, first + i - cached)
            tl.debug_barrier()
            to = CACHE_SHIFT + target[:, None] * 2 * HEAD_SIZE + column[None, :]
            tl.store(rows + to, k, mask=mask)
            tl.store(rows + to + HEAD_SIZE, v, mask=mask)
            tl.store(positions + target, position, mask=stays)
            tl.debug_barrier()

    for start in range(0, tokens, ROWS):
        t = start + tl.arange(0, ROWS)
        mask = (t < tokens)[:, None] & is_column[None, :]
        token = (request * tokens + t)[:, None]
        k = tl.load(key + token * key_token_stride + head * key_head_stride + column[None, :], mask=mask)
        v = tl.load(value + token * value_token_stride + head * value_head_stride + column[None, :], mask=mask)
        at = ((seen - 1 + t) % ring_rows * 2 * HEAD_SIZE)[:, None] + column[None, :]
        tl.store(rows + at, k, mask=mask)
        tl.store(rows + at + HEAD_SIZE, v, mask=mask)


def tile_rows(dtype: torch.dtype) -> int:
    """Rows at a time: products in float32 of more would not fit into the 99 KiB that smaller GPUs share."""
    return 64 // dtype.itemsize


class Workspace:
    """Working memory of `advance` for up to so many requests."""

    def __init__(self, requests: int, heads: int, rules: Rules, device: torch.device) -> None:
        candidates = triton.next_power_of_2(rules.settings.cache + rules.settings.chunk)
        self.scores = torch.empty(requests * heads, candidates, device=device)
        self.targets = torch.empty(requests * heads, candidates, dtype=torch.int32, device=device)


def advance(
    key: torch.Tensor,
    value: torch.Tensor,
    memory: Memory,
    blocks: torch.Tensor,
    seq_lens: torch.Tensor | None,
    first_seen: int,
    rules: Rules,
    workspace: Workspace,
) -> None:
    """Let a chunk leave where it has to, and write the new rows.

    Args:
        key, value: [B, KV, d], one token of each request; or [T, KV, d], tokens of one span of one request.
        blocks: int32 [B]; or [1].
        seq_lens: int32 [B], the new token included, 0 for padding; None for one request.
        first_seen: for one request, its number of tokens with the first of these.
    """
    settings, head_size = rules.settings, key.shape[-1]
    requests, tokens = (len(key), 1) if seq_lens is not None else (1, len(key))
    slope = rules.state if isinstance(rules.state, SlopeState) else None
    rank = settings.state_rank if slope is not None else 0
    sums = memory.sums or dict.fromkeys(("key_mean", "value_mean", "cross_moment", "second_moment"), memory.positions)
    layout = memory.format
    _advance_kernel[(requests * memory.heads,)](
        key,
        value,
        seq_lens,
        first_seen,
        tokens,
        blocks,
        memory.ring,
        memory.positions,
        sums["key_mean"],
        sums["value_mean"],
        sums["cross_moment"],
        sums["second_moment"],
        slope.directions.key if slope is not None else memory.positions,
        workspace.scores,
        workspace.targets,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        blocks.stride(0),
        memory.ring.stride(0),
        memory.ring.stride(1),
        memory.positions.stride(0),
        memory.positions.stride(1),
        RIDGE,
        LEAST_VARIANCE,
        KV_HEADS=memory.heads,
        HEAD_SIZE=head_size,
        D=max(16, triton.next_power_of_2(head_size)),
        RANK=rank,
        R=max(16, triton.next_power_of_2(rank)),
        WINDOW=settings.window,
        CHUNK=settings.chunk,
        CACHE=settings.cache,
        SINKS=settings.sink_tokens,
        IS_RANDOM=settings.select == "random",
        CACHE_SHIFT=(layout.cache_offset - layout.ring_offset) // layout.dtype.itemsize,
        N=triton.next_power_of_2(settings.cache + settings.chunk),
        ROWS=tile_rows(key.dtype),
        num_warps=4,
    )
