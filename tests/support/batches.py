"""A ragged batch of random requests over shared page pools, for tests of selection and attention."""

from dataclasses import dataclass

import torch
from pages import empty_factors

from vllm_lrqk.methods.lrqk.format import FactorPages
from vllm_lrqk.methods.lrqk.seal import seal_pages
from vllm_lrqk.methods.lrqk.settings import LRQKSettings


@dataclass
class Batch:
    """Requests of given lengths; everything that no request may read is NaN."""

    query: torch.Tensor
    """[B, H, d]"""
    keys: list[torch.Tensor]
    """Per request [KV, length, d]"""
    values: list[torch.Tensor]
    """Per request [KV, length, d]"""
    host: torch.Tensor
    """[num_pages, KV, N, 2, d]"""
    factors: FactorPages
    block_table: torch.Tensor
    """int32 [B, P]; places past a request's pages name an unused page"""
    seq_lens: torch.Tensor
    """int32 [B]"""
    scale: float


def make_batch(
    lengths: list[int],
    config: LRQKSettings,
    kv_heads: int = 2,
    group: int = 3,
    d: int = 32,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Requests with random keys, values and queries; full pages are sealed."""
    generator = torch.Generator().manual_seed(seed)
    n = config.page_size
    counts = [-(-length // n) for length in lengths]
    num_pages = sum(counts) + 2  # two pages that nobody uses
    shuffled = torch.randperm(num_pages, generator=generator)
    unused = int(shuffled[-1])
    block_table = torch.full((len(lengths), max(counts)), unused, dtype=torch.int32)
    host = torch.full((num_pages, kv_heads, n, 2, d), torch.nan, dtype=dtype)
    factors = empty_factors(config, d, num_pages, kv_heads)
    keys, values, start = [], [], 0
    for b, (length, count) in enumerate(zip(lengths, counts)):
        pages = shuffled[start : start + count]
        start += count
        block_table[b, :count] = pages
        key, value = (torch.randn(kv_heads, length, d, generator=generator).to(dtype) for _ in range(2))
        for i in range(length):
            host[pages[i // n], :, i % n] = torch.stack([key[:, i], value[:, i]], 1)
        if length >= n:
            seal_pages(pages[: length // n], host, factors, config)
        keys.append(key)
        values.append(value)
    query = 2 * torch.randn(len(lengths), kv_heads * group, d, generator=generator).to(dtype)
    return Batch(query, keys, values, host, factors, block_table, torch.tensor(lengths).int(), d**-0.5)


def token_proxies(batch: Batch, b: int, config: LRQKSettings) -> torch.Tensor:
    """Proxy scores of request b's sealed tokens, one by one from the page format's formula: float64 [H, sealed]."""
    kv_heads, n = batch.factors.raw.shape[1], config.page_size
    group = batch.query.shape[1] // kv_heads
    length = int(batch.seq_lens[b])
    scores = torch.zeros(batch.query.shape[1], length // n * n, dtype=torch.float64)
    for p in range(length // n):
        page = batch.block_table[b, p].long()
        a = batch.factors.key_factor(page).double()  # [KV, N, r]
        for h in range(batch.query.shape[1]):
            kv = h // group
            x = batch.factors.projection[page, kv].double()  # [r, d]
            weights = batch.query[b, h].double() @ x.T * batch.factors.projection_scale[page, kv].double()
            scores[h, p * n : (p + 1) * n] = a[kv] @ weights * batch.scale
    return scores
