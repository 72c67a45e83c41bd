"""Exact attention to a sliding window: the plain torch form."""

import torch

from vllm_lrqk.core.logits import PLAIN, Logits

TILE_TOKENS = 512


def window_attention(
    query: torch.Tensor,
    rows: torch.Tensor,
    pages: torch.Tensor,
    context_len: int,
    window: int,
    scale: float,
    output: torch.Tensor,
    logits: Logits = PLAIN,
) -> None:
    """Attend the last tokens of a request, whose own keys and values are in the pages already.

    The token at position p attends to positions p - window + 1 ... p.

    Args:
        query, output: [T, H, d], tokens at positions context_len ... context_len + T - 1.
        rows: [num_pages, KV, N, 2, d], keys and values.
        pages: int [P], the request's pages in order; those before every window are not read.
    """
    page_size, kv_heads = rows.shape[2], rows.shape[1]
    for start in range(0, len(query), TILE_TOKENS):
        tile = query[start : start + TILE_TOKENS]
        position = context_len + start + torch.arange(len(tile), device=query.device)
        begin = max(0, context_len + start - window + 1) // page_size
        end = -(-(context_len + start + len(tile)) // page_size)
        found = rows[pages[begin:end].long()].transpose(0, 1).flatten(1, 2)  # [KV, length, 2, d]
        age = position[:, None] - (begin * page_size + torch.arange(found.shape[1], device=query.device))
        is_seen = (age >= 0) & (age < window)
        grouped = tile.float().transpose(0, 1).unflatten(0, (kv_heads, -1)) * scale  # [KV, G, T, d]
        scores = logits.capped(grouped @ found[:, None, :, 0].float().mT).masked_fill(~is_seen, -torch.inf)
        attended = torch.cat([scores, *_sinks_of(scores, logits)], -1)
        weight = attended.softmax(-1)[..., : scores.shape[-1]]
        value = found[:, None, :, 1].float().masked_fill(~is_seen.any(0)[:, None], 0.0)  # may never have been written
        output[start : start + len(tile)] = (weight @ value).flatten(0, 1).transpose(0, 1)


def _sinks_of(scores: torch.Tensor, logits: Logits) -> list[torch.Tensor]:
    """The sinks as one more column of scores [KV, G, T, length], if there are any."""
    if logits.sinks is None:
        return []
    return [logits.sinks.view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)]


def window_decode(
    query: torch.Tensor,
    rows: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    window: int,
    scale: float,
    output: torch.Tensor,
    logits: Logits = PLAIN,
) -> None:
    """Attend one token of each of B requests.

    Args:
        query, output: [B, H, d].
        rows: [num_pages, KV, N, 2, d].
        block_table: int [B, P].
        seq_lens: int [B], the current token included; 0 for padding, whose output is zero.
    """
    for row, length in enumerate(seq_lens.tolist()):
        of = slice(row, row + 1)
        if length == 0:
            output[of] = 0
            continue
        window_attention(query[of], rows, block_table[row], length - 1, window, scale, output[of], logits)
