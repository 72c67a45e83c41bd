"""Selection where the CUDA extension is not built: scores in Triton, the rest in torch operators that never wait.

Shapes: B requests, H query heads, KV kv heads, G = H / KV, d head size, N page tokens, P pages, r rank.
"""

import torch
import triton
import triton.language as tl

from vllm_lrqk.core.selection import Selection, always_rows, candidate_range, heaviest
from vllm_lrqk.methods.lrqk.format import FactorPages
from vllm_lrqk.methods.lrqk.score import mean_factors
from vllm_lrqk.methods.lrqk.settings import LRQKConfig


@triton.jit
def _score_kernel(
    query,  # [B, H, d]
    words,  # int8 or bfloat16 [num_pages, KV, r / w, N, w]
    projection,  # [num_pages, KV, r, d]
    column_scale,  # float32 [num_pages, KV, r]
    block_table,  # int32 [B, P]
    ends,  # int64 [B], end of the candidates
    scores,  # float32 [B, H, P, N]
    first,
    scale,
    query_request_stride,
    query_head_stride,
    word_page_stride,
    word_head_stride,
    projection_page_stride,
    projection_head_stride,
    scale_page_stride,
    scale_head_stride,
    table_stride,
    pages,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    WORD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    item, page = tl.program_id(0).to(tl.int64), tl.program_id(1)
    request, kv_head = item // KV_HEADS, item % KV_HEADS
    g, j, column = tl.arange(0, GROUP_BLOCK), tl.arange(0, RANK_BLOCK), tl.arange(0, HEAD_BLOCK)
    is_head, is_row, is_column = g < GROUP, j < RANK, column < HEAD_SIZE
    head = kv_head * GROUP + g
    end = tl.load(ends + request)
    has_candidates = (page * PAGE_SIZE < end) & ((page + 1) * PAGE_SIZE > first)
    to = scores + ((request * KV_HEADS * GROUP + head[:, None]) * pages + page) * PAGE_SIZE
    if has_candidates:
        index = tl.load(block_table + request * table_stride + page).to(tl.int64)
        q_at = request * query_request_stride + head[:, None] * query_head_stride + column[None, :]
        q = tl.load(query + q_at, mask=is_head[:, None] & is_column[None, :], other=0.0).to(tl.float32)
        x_at = index * projection_page_stride + kv_head * projection_head_stride
        x_at = x_at + j[:, None] * HEAD_SIZE + column[None, :]
        x = tl.load(projection + x_at, mask=is_row[:, None] & is_column[None, :], other=0).to(tl.float32)
        scale_at = index * scale_page_stride + kv_head * scale_head_stride + j
        factor = tl.load(column_scale + scale_at, mask=is_row, other=0.0) * scale
        projected = tl.dot(q, tl.trans(x), input_precision="ieee") * factor[None, :]
        word_at = index * word_page_stride + kv_head * word_head_stride
        for start in range(0, PAGE_SIZE, TOKENS):
            token = start + tl.arange(0, TOKENS)
            a_at = word_at + ((j // WORD)[:, None] * PAGE_SIZE + token[None, :]) * WORD + (j % WORD)[:, None]
            a = tl.load(words + a_at, mask=is_row[:, None], other=0).to(tl.float32)
            score = tl.dot(projected, a, input_precision="ieee")
            position = page * PAGE_SIZE + token
            is_candidate = (position >= first) & (position < end)
            score = tl.where(is_candidate[None, :], score, float("-inf"))
            tl.store(to + token[None, :], score, mask=is_head[:, None])
    else:
        for start in range(0, PAGE_SIZE, TOKENS):
            token = start + tl.arange(0, TOKENS)
            none = tl.full([GROUP_BLOCK, TOKENS], float("-inf"), tl.float32)
            tl.store(to + token[None, :], none, mask=is_head[:, None])


def candidate_scores(
    query: torch.Tensor,
    factors: FactorPages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    config: LRQKConfig,
) -> torch.Tensor:
    """Proxy scores of the candidates, -inf for all other tokens: float32 [B, H, P, N]."""
    f, (requests, heads, head_size) = factors.format, query.shape
    kv_heads, pages = factors.raw.shape[1], block_table.shape[1]
    group = heads // kv_heads
    first, ends = candidate_range(seq_lens, config)
    scores = torch.empty(requests, heads, pages, f.page_size, device=query.device)
    _score_kernel[(requests * kv_heads, pages)](
        query,
        factors.key_factor_words,
        factors.projection,
        factors.scale,
        block_table,
        ends,
        scores,
        first,
        scale,
        query.stride(0),
        query.stride(1),
        *factors.key_factor_words.stride()[:2],
        *factors.projection.stride()[:2],
        *factors.scale.stride()[:2],
        block_table.stride(0),
        pages,
        KV_HEADS=kv_heads,
        GROUP=group,
        GROUP_BLOCK=max(16, triton.next_power_of_2(group)),
        HEAD_SIZE=head_size,
        HEAD_BLOCK=max(16, triton.next_power_of_2(head_size)),
        RANK=f.rank,
        RANK_BLOCK=max(16, triton.next_power_of_2(f.rank)),
        WORD=f.word_elements,
        PAGE_SIZE=f.page_size,
        TOKENS=min(f.page_size, 64),
        num_warps=4,
    )
    return scores


def select(
    query: torch.Tensor,
    factors: FactorPages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    config: LRQKConfig,
) -> Selection:
    """As `vllm_lrqk.methods.lrqk.score.select`, for all pages of the block table: no size depends on the lengths."""
    kv_heads = factors.raw.shape[1]
    _, end = candidate_range(seq_lens, config)
    scores = candidate_scores(query, factors, block_table, seq_lens, scale, config)
    flat = scores.flatten(2)  # [B, H, P * N]
    is_candidate = flat[:, :1] > -torch.inf
    weight = flat.softmax(-1).nan_to_num(0.0).unflatten(1, (kv_heads, -1)).sum(2)  # [B, KV, P * N]
    weight = weight.masked_fill(~is_candidate, -1.0)
    tokens, is_selected = heaviest(weight, query.shape[1] // kv_heads, config)
    rows = torch.where(is_selected, tokens, -1)
    rows = torch.nn.functional.pad(rows, (0, config.top_k - rows.shape[-1]), value=-1)
    residual = residual_factor = None
    if config.residual != "none":
        chosen = torch.zeros_like(weight, dtype=torch.bool).scatter_(-1, tokens, is_selected)
        left = flat.unflatten(1, (kv_heads, -1)).masked_fill(chosen[:, :, None], -torch.inf)
        left = left.flatten(1, 2).view_as(scores)
        residual = left.logsumexp(-1)
        if config.residual == "linear":
            # The block table means nothing where nothing is left: of padding, and past the end of a request.
            pages = block_table.long().masked_fill(residual.isinf().all(1), 0)
            residual_factor = mean_factors(left, residual, factors, pages)
    always = always_rows(seq_lens.long(), end, config)[:, None].expand(-1, kv_heads, -1)
    return Selection(torch.cat([rows, always], -1).int(), residual, residual_factor)
