"""How many requests fit, against handing out blocks one by one."""

import itertools

import pytest

from vllm_lrqk.core.capacity import Capacity, HostTier, backed_blocks
from vllm_lrqk.core.method import MemoryPlan

PAGE = 16


def capacity(num_blocks: int, host_pages: int | None, hot: int, max_requests: int) -> Capacity:
    plan = MemoryPlan(PAGE, 8, is_paged=True, blocks_per_request=hot, host_bytes_per_token=64)
    return Capacity(plan, 6, 64, num_blocks, host_pages, max_requests)


def hand_out(room: Capacity, length: int) -> int:
    """Requests served one by one: constant blocks from the ids without a host page first, as the managers do."""
    pages, hot = room.blocks_of(length)
    backed = room.num_blocks if room.host_pages is None else min(room.host_pages, room.num_blocks)
    spare, shared = room.num_blocks - backed, backed - 1
    for served in itertools.count():
        from_spare = min(hot, spare)
        if served == room.max_requests or shared < pages + hot - from_spare:
            return served
        spare, shared = spare - from_spare, shared - pages - (hot - from_spare)
    raise AssertionError


@pytest.mark.parametrize("host_pages", [None, 9, 40, 500])
@pytest.mark.parametrize("hot", [0, 3, 11])
@pytest.mark.parametrize("max_requests", [2, 100])
def test_requests(host_pages: int | None, hot: int, max_requests: int) -> None:
    for num_blocks, length in itertools.product((10, 61, 300), (1, 15, 16, 17, 100, 700)):
        room = capacity(num_blocks, host_pages, hot, max_requests)
        assert room.requests(length) == hand_out(room, length), (num_blocks, length)


def test_tokens_are_what_the_requests_hold_and_the_rest_of_the_cache() -> None:
    room = capacity(num_blocks=101, host_pages=51, hot=4, max_requests=1000)
    assert room.requests(80) == 10  # 5 pages each, and 40 of the 50 blocks without a host page
    assert room.tokens(80) == 50 * PAGE == room.host_tokens
    short = capacity(num_blocks=61, host_pages=51, hot=4, max_requests=1000)
    assert short.requests(80) == 6  # 6 * (5 + 4) of 60
    assert short.tokens(80) == (60 - 26) * PAGE  # 60 / 9 requests own 26 blocks
    assert short.limit(80) == "device memory"
    assert room.limit(80) == "host memory"
    assert capacity(61, 51, 4, 6).limit(80) == "max_num_seqs"
    few = capacity(61, 51, 4, 1)
    assert few.tokens(80) == 50 * PAGE  # one request owns 4 blocks, which lie where no page can


def test_a_pool_that_backs_the_host_tier_is_never_what_limits() -> None:
    plan = MemoryPlan(PAGE, 8, is_paged=True, blocks_per_request=7, host_bytes_per_token=64)
    host = HostTier.of(plan, 6, 10_000_000)
    assert host is not None
    assert host.page_bytes == 6 * PAGE * 64
    room = Capacity(plan, 6, 64, backed_blocks(plan, host, 5), host.num_pages, 5)
    assert room.tokens(1000) == room.host_tokens


def test_memory_by_the_request_alone() -> None:
    plan = MemoryPlan(64, 100, is_paged=False, blocks_per_request=1)
    room = Capacity(plan, 6, 64, num_blocks=11, host_pages=None, max_requests=100)
    assert HostTier.of(plan, 6, 1 << 30) is None
    assert room.requests(10) == room.requests(1_000_000) == 10
    assert room.tokens(1_000_000) == 10_000_000
    assert (room.device_bytes_per_token, room.device_bytes_per_request) == (0, 6 * 6400)
