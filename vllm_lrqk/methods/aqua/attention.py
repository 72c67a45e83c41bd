"""AQUA attention of one layer over its blocks: the plain torch form.

Shapes: B requests, T tokens, H query heads, KV kv heads, G = H / KV, d head size, s stored dimensions, P blocks of
N tokens.
"""

import torch

from vllm_lrqk.core.prefill import TILE_TOKENS, flash_attention, merge
from vllm_lrqk.methods.aqua.basis import Basis
from vllm_lrqk.methods.aqua.format import Blocks
from vllm_lrqk.methods.aqua.settings import AquaSettings


def append(key: torch.Tensor, value: torch.Tensor, blocks: Blocks, basis: Basis, slot_mapping: torch.Tensor) -> None:
    """Project new keys and store them beside their values.

    Args:
        key, value: [T, KV, d].
        slot_mapping: int64 [T], block id * N + offset; a negative slot is skipped.
    """
    is_token = slot_mapping >= 0
    if not bool(is_token.all()):
        key, value, slot_mapping = key[is_token], value[is_token], slot_mapping[is_token]
    block, offset = slot_mapping // blocks.format.block_size, slot_mapping % blocks.format.block_size
    projected = basis.project_key(key)  # [T, KV, s]
    if blocks.format.is_quantized:
        relative = projected / basis.sigma
        scale = relative.abs().amax(-1).clamp_min(1e-30) / 127
        projected = (relative / scale[..., None]).round()
        blocks.key_scale[block, :, offset] = scale
    blocks.key[block, :, :, offset] = projected.to(blocks.format.key_dtype)
    blocks.value[block, :, offset] = value


def chosen_dimensions(projected_query: torch.Tensor, sigma: torch.Tensor, keep: int, choose: str) -> torch.Tensor:
    """Which dimensions each query head's scores use: bool [B, H, s], `keep` of them per head.

    "query_head" takes those with the largest |q^| (the paper's rule). "kv_head" takes one set for a group, those with
    the largest sum of (|q^_j| sigma_j)^2: what dimension j adds to the variance of the group's scores.

    Args:
        projected_query: float32 [B, H, s].
        sigma: float32 [KV, s].
    """
    size = projected_query.square()
    group = projected_query.shape[1] // len(sigma)
    if choose == "kv_head":
        size = (size.unflatten(1, (len(sigma), group)) * sigma.square()[:, None]).sum(2)
    chosen = torch.zeros_like(size, dtype=torch.bool).scatter_(-1, size.topk(keep, -1).indices, True)
    return chosen.repeat_interleave(group, 1) if choose == "kv_head" else chosen


def decode_attention(
    query: torch.Tensor,
    blocks: Blocks,
    basis: Basis,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    config: AquaSettings,
    output: torch.Tensor,
) -> None:
    """Attend with one query token per request; its own key and value are in the blocks already.

        out = softmax(scale * sum_{j in I(q^)} q^_j k^_nj) V

    Args:
        query, output: [B, H, d].
        block_table: int [B, P], block ids; entries past a request's last block are never used.
        seq_lens: int [B], the current token included; 0 for padding, whose output is zero.
    """
    f = blocks.format
    kv_heads = blocks.raw.shape[1]
    projected = basis.project_query(query)  # [B, H, s]
    keep = config.num_kept(f.head_size)
    if keep < f.stored:
        projected = projected * chosen_dimensions(projected, basis.sigma, keep, config.choose)
    table = block_table[:, : -(-int(seq_lens.max()) // f.block_size)].long()
    table = table.masked_fill(torch.arange(table.shape[1], device=query.device) * f.block_size >= seq_lens[:, None], 0)
    is_token = torch.arange(table.shape[1] * f.block_size, device=query.device) < seq_lens[:, None]  # [B, P N]
    key = blocks.projected_key(table, basis.sigma).permute(0, 2, 3, 1, 4).flatten(3)  # [B, KV, s, P N]
    value = blocks.value[table].transpose(1, 2).flatten(2, 3).float()  # [B, KV, P N, d]
    value = value.masked_fill(~is_token[:, None, :, None], 0.0)
    scores = projected.unflatten(1, (kv_heads, -1)) @ key * scale  # [B, KV, G, P N]
    weight = scores.masked_fill(~is_token[:, None, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    output.copy_((weight @ value).flatten(1, 2))


def prefill_attention(
    query: torch.Tensor,
    blocks: Blocks,
    basis: Basis,
    pages: torch.Tensor,
    context_len: int,
    scale: float,
    output: torch.Tensor,
) -> None:
    """Attend with a chunk of one request, whose keys and values are in the blocks already.

    All stored dimensions count, so that with all of them stored this is dense attention. The chunk's own keys are
    read as they were stored: what a token attends to does not depend on how its prompt was cut into chunks.

    Args:
        query, output: [T, H, d], the chunk's tokens at positions context_len ... context_len + T - 1.
        pages: int [P], the request's block ids in order.
    """
    tokens, heads, d = query.shape
    kv_heads = blocks.raw.shape[1]
    group = heads // kv_heads
    projected = _pad(basis.project_query(query), d).to(query.dtype).transpose(0, 1)  # [H, T, d]
    key, value = _rows(blocks, basis, pages, context_len, context_len + tokens)
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    total, log_sum = flash_attention(projected, key, value, scale, causal=True)
    # History needs no mask, so the query heads of one KV head become rows of one problem.
    rows = projected.reshape(kv_heads, group * tokens, d)
    total, log_sum = total.reshape(rows.shape), log_sum.reshape(rows.shape[:2])
    for start in range(0, context_len, TILE_TOKENS):
        key, value = _rows(blocks, basis, pages, start, min(start + TILE_TOKENS, context_len))
        total, log_sum = merge(total, log_sum, *flash_attention(rows, key, value, scale, causal=False))
    output.copy_(total.reshape(heads, tokens, d).transpose(0, 1))


def _rows(blocks: Blocks, basis: Basis, pages: torch.Tensor, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys, filled up with zeros, and values of tokens start ... end - 1 of a request: [KV, end - start, d] each."""
    n, d, dtype = blocks.format.block_size, blocks.format.head_size, blocks.format.value_dtype
    ids = pages[start // n : -(-end // n)].long()
    first = start // n * n
    inside = slice(start - first, end - first)
    key = blocks.projected_key(ids, basis.sigma).permute(1, 0, 3, 2).flatten(1, 2)[:, inside]
    value = blocks.value[ids].transpose(0, 1).flatten(1, 2)[:, inside]
    return _pad(key, d).to(dtype), value


def _pad(vectors: torch.Tensor, size: int) -> torch.Tensor:
    """[..., s] with zeros up to `size`: attention kernels want keys as wide as values."""
    return torch.nn.functional.pad(vectors, (0, size - vectors.shape[-1]))
