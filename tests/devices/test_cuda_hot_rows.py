"""Resolve and fetch, emulated: what ends up in the hot slots is what the host pages hold, whatever was there before."""

from collections.abc import Iterator

import pytest
import torch
from emulated import emulated_operators
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lrqk.core.attend import gather_rows
from vllm_lrqk.core.hot_rows import HotCache, HotFormat
from vllm_lrqk.devices.cuda_hot_rows import DeviceHotCache, Resolved

KV_HEADS, HEAD_SIZE, PAGE_SIZE, NUM_PAGES, NUM_BLOCKS = 2, 16, 8, 24, 40
FORMAT = HotFormat(block_bytes=3 * (2 * HEAD_SIZE * 4 + 12) + 12, head_size=HEAD_SIZE, dtype=torch.float32)
SLOTS_PER_BLOCK = 3


class Layer:
    """Host pages and a hot cache whose blocks hold leftovers."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        shape = (NUM_BLOCKS, KV_HEADS, FORMAT.block_bytes)
        raw = torch.randint(0, 256, shape, dtype=torch.uint8, generator=self.generator)
        assert FORMAT.rows_per_block == SLOTS_PER_BLOCK
        self.cache = DeviceHotCache(emulated_operators(), raw, FORMAT, NUM_PAGES)
        self.host = torch.full((NUM_PAGES, KV_HEADS, PAGE_SIZE, 2, HEAD_SIZE), torch.nan)

    def fill(self, pages: list[int]) -> None:
        """Write new keys and values into pages, as a request does that takes them over; also a step of the clock."""
        slot_mapping = torch.cat([torch.arange(PAGE_SIZE) + page * PAGE_SIZE for page in pages] or [torch.tensor([-1])])
        key, value = torch.randn(2, len(slot_mapping), KV_HEADS, HEAD_SIZE, generator=self.generator)
        self.cache.append(key, value, self.host, slot_mapping)

    def resolve(
        self, rows: torch.Tensor, block_table: torch.Tensor, hot_blocks: torch.Tensor, lens: torch.Tensor
    ) -> tuple[torch.Tensor, int, int]:
        """The slots' contents for the wanted rows [B, KV, R, 2, d], hits, and misses that are no current tokens."""
        requests, _, capacity = rows.shape
        hot_slots = hot_blocks.shape[1] * SLOTS_PER_BLOCK
        memory = Resolved.allocate(requests + 1, KV_HEADS, capacity, hot_slots, torch.device("cpu"))
        for tensor in (memory.address, memory.miss_address, memory._table, memory._age, memory._miss_place):
            tensor.fill_(-999)
        resolved = memory.first(requests)
        before = self.cache.counters.clone()
        self.cache.resolve(rows, block_table, lens, hot_blocks, PAGE_SIZE, resolved)
        current = gather_rows(self.host, block_table, (lens - 1).view(-1, 1, 1).expand(-1, KV_HEADS, 1))[:, :, 0]
        self.cache.fetch(self.host, current[:, :, 0].contiguous(), current[:, :, 1].contiguous(), resolved)

        flat = self.cache.rows.flatten()
        there = resolved.address
        is_missing = (rows >= 0) & (there < 0)
        assert torch.equal(is_missing.sum(-1).int(), resolved.miss_count)
        address = there.clone()
        for b in range(requests):
            for h in range(KV_HEADS):
                count = int(resolved.miss_count[b, h])
                assert (resolved.miss_address[b, h, count:] == -1).all()
                # Missing rows keep their order.
                address[b, h, is_missing[b, h]] = resolved.miss_address[b, h, :count]
        used = [address[b, h, rows[b, h] >= 0].tolist() for b in range(requests) for h in range(KV_HEADS)]
        assert all(len(set(items)) == len(items) for items in used)
        element = address.clamp_min(0) // 4
        got = flat[element[..., None] + torch.arange(2 * HEAD_SIZE)].unflatten(-1, (2, HEAD_SIZE))
        hits, misses = (self.cache.counters - before).tolist()
        return got, hits, misses


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 6), wanted=st.integers(1, 12))
def test_slots_hold_host_rows(seed: int, steps: int, wanted: int) -> None:
    layer = Layer(seed)
    generator = layer.generator
    hot_blocks = torch.randperm(NUM_BLOCKS, generator=generator)[:10].view(2, 5).int()  # 15 slots a request
    for step in range(steps):
        block_table = torch.randperm(NUM_PAGES, generator=generator)[:8].view(2, 4).int()
        new = block_table.flatten()[torch.rand(8, generator=generator) < (1.0 if step == 0 else 0.3)].tolist()
        never = [p for p in block_table.flatten().tolist() if torch.isnan(layer.host[p]).any()]
        layer.fill(sorted({*new, *never}))
        rows = torch.stack([torch.randperm(32, generator=generator)[:wanted] for _ in range(4)]).view(
            2, KV_HEADS, wanted
        )
        rows[torch.rand(rows.shape, generator=generator) < 0.2] = -1
        rows = rows.int()
        lens = torch.tensor([32, 31]).int()
        right = gather_rows(layer.host, block_table, rows)
        got, hits, misses = layer.resolve(rows, block_table, hot_blocks, lens)
        assert torch.equal(got[rows >= 0], right[rows >= 0])
        num_wanted, new_tokens = int((rows >= 0).sum()), int((rows == lens[:, None, None] - 1).sum())
        assert num_wanted - new_tokens <= hits + misses <= num_wanted
        layer.fill([])
        got, hits, misses = layer.resolve(rows, block_table, hot_blocks, lens)
        assert torch.equal(got[rows >= 0], right[rows >= 0])
        assert (hits, misses) == (num_wanted - new_tokens, 0)


@pytest.fixture
def one_request() -> Iterator[tuple[Layer, torch.Tensor, torch.Tensor]]:
    layer = Layer(0)
    layer.fill([0, 1, 2, 3])
    yield layer, torch.arange(4)[None].int(), torch.arange(2)[None].int()  # six slots


def wanted(*positions: int) -> torch.Tensor:
    return torch.tensor(positions).int().expand(1, KV_HEADS, -1).contiguous()


def test_keeps_the_rows_used_last(one_request: tuple[Layer, torch.Tensor, torch.Tensor]) -> None:
    layer, table, hot_blocks = one_request

    def resolve(*positions: int) -> tuple[int, int]:
        layer.fill([])
        _, hits, misses = layer.resolve(wanted(*positions), table, hot_blocks, torch.tensor([32]).int())
        return hits // KV_HEADS, misses // KV_HEADS

    assert resolve(0, 1, 2, 3) == (0, 4)
    assert resolve(0, 1, 9, 10) == (2, 2)
    assert resolve(20, 21) == (0, 2)  # evicts 2 and 3
    assert resolve(0, 1, 9, 10, 20, 21) == (6, 0)
    assert resolve(2) == (0, 1)


def test_a_page_written_anew_is_fetched_anew(one_request: tuple[Layer, torch.Tensor, torch.Tensor]) -> None:
    layer, table, hot_blocks = one_request
    rows, lens = wanted(3, 12), torch.tensor([32]).int()
    layer.resolve(rows, table, hot_blocks, lens)
    layer.fill([0])
    got, hits, misses = layer.resolve(rows, table, hot_blocks, lens)
    assert (hits, misses) == (KV_HEADS, KV_HEADS)
    assert torch.equal(got, gather_rows(layer.host, table, rows))


def test_the_row_of_a_rejected_token_is_not_kept(one_request: tuple[Layer, torch.Tensor, torch.Tensor]) -> None:
    layer, table, hot_blocks = one_request
    rows = wanted(2, 3)
    layer.resolve(rows, table, hot_blocks, torch.tensor([4]).int())
    layer.host[0, :, 3] = 7.0
    for length, expected in ((4, 1), (4, 1), (5, 2)):
        got, hits, misses = layer.resolve(rows, table, hot_blocks, torch.tensor([length]).int())
        assert torch.equal(got, gather_rows(layer.host, table, rows))
        assert (hits, misses) == (expected * KV_HEADS, 0)


def test_padding_touches_nothing(one_request: tuple[Layer, torch.Tensor, torch.Tensor]) -> None:
    layer, table, hot_blocks = one_request
    before = layer.cache.raw.clone()
    memory = Resolved.allocate(1, KV_HEADS, 3, 6, torch.device("cpu"))
    rows, lens = torch.full((1, KV_HEADS, 3), -1).int(), torch.zeros(1).int()
    layer.cache.resolve(rows, table + (1 << 30), lens, hot_blocks + (1 << 30), PAGE_SIZE, memory)
    assert (memory.address == -1).all()
    assert (memory.miss_address == -1).all()
    assert (memory.miss_count == 0).all()
    assert torch.equal(layer.cache.raw, before)


def test_marks_rows_like_the_torch_form(one_request: tuple[Layer, torch.Tensor, torch.Tensor]) -> None:
    """A slot that the kernel filled is a hit for the torch form on the same bytes, and the other way round."""
    layer, table, hot_blocks = one_request
    rows, lens = wanted(3, 12, 30), torch.tensor([32]).int()
    layer.resolve(rows, table, hot_blocks, lens)
    plain = HotCache(layer.cache.raw, FORMAT, NUM_PAGES)
    plain.generation.copy_(layer.cache.generation)
    assert int(plain.generation[3]) == 1
    assert plain.resolve(rows, layer.host, table, hot_blocks, lens, 9)[1].hits == 3 * KV_HEADS
    more = wanted(3, 12, 17)
    plain.resolve(more, layer.host, table, hot_blocks, lens, 10)
    assert layer.resolve(more, table, hot_blocks, lens)[1:] == (3 * KV_HEADS, 0)


def test_appended_rows_and_generations() -> None:
    layer = Layer(0)
    slot_mapping = torch.tensor([5 * PAGE_SIZE, -1, 5 * PAGE_SIZE + 1, 7 * PAGE_SIZE + 3])
    key, value = torch.randn(2, 4, KV_HEADS, HEAD_SIZE)
    layer.cache.append(key, value, layer.host, slot_mapping)
    assert layer.cache.generation.nonzero().flatten().tolist() == [5]
    assert int(layer.cache.clock) == 1
    for token, page, offset in [(0, 5, 0), (2, 5, 1), (3, 7, 3)]:
        assert torch.equal(layer.host[page, :, offset, 0], key[token])
        assert torch.equal(layer.host[page, :, offset, 1], value[token])
    assert int((~layer.host.isnan()).sum()) == 3 * KV_HEADS * 2 * HEAD_SIZE


@pytest.mark.parametrize(("name", "place"), [("key", 0), ("value", 1), ("host", 2)])
def test_misaligned_rows_are_refused(name: str, place: int) -> None:
    """Rows are copied 8 and 16 bytes at a time, which a GPU does at multiples of those alone."""
    layer = Layer(0)
    tensors = [torch.zeros(1, KV_HEADS, HEAD_SIZE), torch.zeros(1, KV_HEADS, HEAD_SIZE), layer.host]
    wrong = tensors[place]
    tensors[place] = torch.zeros(wrong.numel() + 1)[1:].view(wrong.shape)
    with pytest.raises(RuntimeError, match=f"{name} must be aligned to"):
        layer.cache.append(*tensors, torch.tensor([3]))
