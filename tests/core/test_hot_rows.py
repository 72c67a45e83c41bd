"""The hot cache hands out exactly what the host pages hold, whatever was in its slots before."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lrqk.core.attend import gather_rows
from vllm_lrqk.core.hot_rows import HotCache, HotFormat

KV_HEADS, HEAD_SIZE, PAGE_SIZE, NUM_PAGES, NUM_BLOCKS = 2, 16, 8, 24, 40
FORMAT = HotFormat(block_bytes=3 * (2 * HEAD_SIZE * 4 + 12) + 8, head_size=HEAD_SIZE, dtype=torch.float32)


def make_cache(seed):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (NUM_BLOCKS, KV_HEADS, FORMAT.block_bytes), dtype=torch.uint8, generator=generator)
    return HotCache(raw, FORMAT, NUM_PAGES)


def fill(cache, host, pages, generator):
    """Write new keys and values into pages, as a request does that takes them over."""
    for page in pages:
        host[page] = torch.randn(host.shape[1:], generator=generator)
        cache.pages_written(torch.arange(PAGE_SIZE) + page * PAGE_SIZE, PAGE_SIZE)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 8), wanted=st.integers(1, 12))
def test_resolves_to_host_rows(seed, steps, wanted):
    generator = torch.Generator().manual_seed(seed)
    cache = make_cache(seed)
    host = torch.full((NUM_PAGES, KV_HEADS, PAGE_SIZE, 2, HEAD_SIZE), torch.nan)
    hot_blocks = torch.randperm(NUM_BLOCKS, generator=generator)[:10].view(2, 5).int()  # 15 slots a request
    for step in range(steps):
        block_table = torch.randperm(NUM_PAGES, generator=generator)[:8].view(2, 4).int()
        new = block_table.flatten()[torch.rand(8, generator=generator) < (1.0 if step == 0 else 0.3)].tolist()
        never = [p for p in block_table.flatten().tolist() if torch.isnan(host[p]).any()]
        fill(cache, host, {*new, *never}, generator)
        rows = torch.stack(
            [torch.randperm(4 * PAGE_SIZE, generator=generator)[:wanted] for _ in range(2 * KV_HEADS)]
        ).view(2, KV_HEADS, wanted)
        rows[torch.rand(rows.shape, generator=generator) < 0.2] = -1
        rows = rows.int()
        lens = torch.tensor([4 * PAGE_SIZE, 4 * PAGE_SIZE - 1]).int()
        got, fetch = cache.resolve(rows, host, block_table, hot_blocks, lens, step)
        right = gather_rows(host, block_table, rows)
        assert torch.equal(got[rows >= 0], right[rows >= 0])
        new_tokens = int((rows == lens[:, None, None] - 1).sum())
        assert int((rows >= 0).sum()) - new_tokens <= fetch.hits + fetch.misses <= int((rows >= 0).sum())
        again, fetch = cache.resolve(rows, host, block_table, hot_blocks, lens, step)
        assert torch.equal(again[rows >= 0], right[rows >= 0])
        assert (fetch.hits, fetch.misses) == (int((rows >= 0).sum()) - new_tokens, 0)


def test_keeps_the_rows_used_last():
    cache = make_cache(0)
    host = torch.randn(NUM_PAGES, KV_HEADS, PAGE_SIZE, 2, HEAD_SIZE)
    table, hot_blocks = torch.arange(4)[None].int(), torch.arange(2)[None].int()  # six slots
    lens = torch.tensor([32])

    def resolve(rows, step):
        rows = torch.tensor(rows).int().expand(1, KV_HEADS, -1)
        fetch = cache.resolve(rows, host, table, hot_blocks, lens, step)[1]
        return fetch.hits // KV_HEADS, fetch.misses // KV_HEADS

    cache.pages_written(torch.arange(4) * PAGE_SIZE, PAGE_SIZE)
    assert resolve([0, 1, 2, 3], 1) == (0, 4)
    assert resolve([0, 1, 9, 10], 2) == (2, 2)
    assert resolve([20, 21], 3) == (0, 2)  # evicts 2 and 3
    assert resolve([0, 1, 9, 10, 20, 21], 4) == (6, 0)
    assert resolve([2], 5) == (0, 1)


def test_a_page_written_anew_is_fetched_anew():
    cache = make_cache(0)
    host = torch.zeros(NUM_PAGES, KV_HEADS, PAGE_SIZE, 2, HEAD_SIZE)
    table, hot_blocks, lens = torch.tensor([[5]]).int(), torch.tensor([[0, 1]]).int(), torch.tensor([PAGE_SIZE])
    rows = torch.tensor([3]).int().expand(1, KV_HEADS, 1)
    fill(cache, host, [5], torch.Generator().manual_seed(1))
    cache.resolve(rows, host, table, hot_blocks, lens, 1)
    fill(cache, host, [5], torch.Generator().manual_seed(2))
    got, fetch = cache.resolve(rows, host, table, hot_blocks, lens, 2)
    assert fetch.misses == KV_HEADS
    assert torch.equal(got, gather_rows(host, table, rows))


def test_the_row_of_a_rejected_token_is_not_kept():
    cache = make_cache(0)
    host = torch.zeros(NUM_PAGES, KV_HEADS, PAGE_SIZE, 2, HEAD_SIZE)
    table, hot_blocks = torch.tensor([[5]]).int(), torch.tensor([[0, 1]]).int()
    fill(cache, host, [5], torch.Generator().manual_seed(1))
    rows, lens = torch.tensor([2, 3]).int().expand(1, KV_HEADS, 2), torch.tensor([4])
    cache.resolve(rows, host, table, hot_blocks, lens, 1)
    host[5, :, 3] = 7.0
    for step in (2, 3):
        got, _ = cache.resolve(rows, host, table, hot_blocks, lens, step)
        assert torch.equal(got, gather_rows(host, table, rows))
    got, fetch = cache.resolve(rows, host, table, hot_blocks, lens + 1, 4)
    assert torch.equal(got, gather_rows(host, table, rows))
    assert fetch.hits == 2 * KV_HEADS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_format_fills_the_block(dtype):
    hot_format = HotFormat(block_bytes=6656, head_size=128, dtype=dtype)
    used = hot_format.rows_per_block * (hot_format.row_bytes + 12)
    assert used <= 6656 < used + hot_format.row_bytes + 12
    assert hot_format.blocks_for(hot_format.rows_per_block) == 1
    assert hot_format.blocks_for(hot_format.rows_per_block + 1) == 2
