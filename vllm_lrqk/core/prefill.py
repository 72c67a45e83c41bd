"""Exact attention of one prompt chunk over the host pages."""

from functools import partial

import torch

from vllm_lrqk.core.logits import PLAIN, Logits

TILE_TOKENS = 4096


def prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    host: torch.Tensor,
    pages: torch.Tensor,
    context_len: int,
    scale: float,
    output: torch.Tensor,
    logits: Logits = PLAIN,
) -> None:
    """Attend a chunk of one request exactly: causal inside the chunk, all earlier tokens in tiles of host pages.

    The parts are merged by log-sum-exp.

    Args:
        query, output: [T, H, d], the chunk's tokens at positions context_len ... context_len + T - 1.
        key, value: [T, KV, d].
        host: [num_pages, KV, N, 2, d].
        pages: int [P], the request's pages in order.
    """
    tokens, heads, _ = query.shape
    page_size, kv_heads = host.shape[2], host.shape[1]
    group = heads // kv_heads
    chunk_key = key.transpose(0, 1).repeat_interleave(group, 0)
    chunk_value = value.transpose(0, 1).repeat_interleave(group, 0)
    attention = partial(capped_attention, logits) if logits.cap else flash_attention
    total, log_sum = attention(query.transpose(0, 1), chunk_key, chunk_value, scale, causal=True)
    # History needs no mask, so the query heads of one KV head become rows of one problem.
    rows = query.transpose(0, 1).reshape(kv_heads, group * tokens, -1)
    total, log_sum = total.reshape(rows.shape), log_sum.reshape(rows.shape[:2])
    for start in range(0, context_len, TILE_TOKENS):
        length = min(TILE_TOKENS, context_len - start)
        tile = host[pages[start // page_size : -(-(start + length) // page_size)].long()]
        tile = tile.transpose(0, 1).flatten(1, 2)[:, :length]  # [KV, length, 2, d]
        part, part_log_sum = attention(rows, tile[:, :, 0], tile[:, :, 1], scale, causal=False)
        total, log_sum = merge(total, log_sum, part, part_log_sum)
    total = logits.beside_sinks(total.reshape(heads, tokens, -1), log_sum.reshape(heads, tokens))
    output.copy_(total.transpose(0, 1))


def merge(
    a: torch.Tensor, a_log_sum: torch.Tensor, b: torch.Tensor, b_log_sum: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two disjoint sets of keys from the attention over each: outputs [..., d], log-sum-exps [...]."""
    log_sum = torch.logaddexp(a_log_sum, b_log_sum)
    weight_a, weight_b = (a_log_sum - log_sum).exp(), (b_log_sum - log_sum).exp()
    return a * weight_a[..., None] + b * weight_b[..., None], log_sum


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 attention [heads, T, d] and log-sum-exp [heads, T]; one head of keys per head of queries."""
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[None], key[None], value[None], is_causal=causal, scale=scale
    )
    return out[0].float(), log_sum[0].float()


def capped_attention(
    logits: Logits, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `flash_attention`, with the soft cap of the logits, which torch's kernels do not have: head by head."""
    output = torch.empty(*query.shape, dtype=torch.float32, device=query.device)
    log_sum = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    for head in range(len(query)):
        scores = logits.capped(query[head].float() @ key[head].float().mT * scale)
        if causal:
            future = torch.ones(scores.shape, dtype=torch.bool, device=scores.device).triu(1)
            scores.masked_fill_(future, -torch.inf)
        log_sum[head] = scores.logsumexp(-1)
        output[head] = (scores - log_sum[head, :, None]).exp() @ value[head].float()
    return output, log_sum
