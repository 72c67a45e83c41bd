"""What vLLM's KV-cache memory is cut into, pages of tokens and blocks of requests, and who hands them out.

One space of block ids serves both tiers: id i is page i on the device and host page i in CPU memory.
Ids from `host_pages` on have no host page and can only be a request's constant blocks.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_lrqk.core.method import MemoryPlan
from vllm_lrqk.integration import compat
from vllm_lrqk.integration.metrics import Series, Writer


@dataclass(frozen=True, kw_only=True)
class PageSpec(FullAttentionSpec):
    """Pages of tokens: raw bytes, one page of them per block and KV head."""

    host_pages: int | None = None
    """Block ids below this have a host page, and only they can hold tokens; None: there is no host tier."""
    series: Series | None = field(default=None, compare=False)
    """What the scheduler writes for `/metrics`; None: nothing."""

    @classmethod
    def merge(cls, specs: list["PageSpec"]) -> "PageSpec":
        assert all(spec == specs[0] for spec in specs), "layers of one group must have equal pages"
        return specs[0]


@dataclass(frozen=True, kw_only=True)
class RequestSpec(AttentionSpec):
    """A constant number of blocks per request, as large as the pages beside them where there are any."""

    blocks_per_request: int
    host_pages: int | None
    """Block ids from this on can hold no tokens, and are taken first."""

    @property
    def prefix_cacheable(self) -> bool:
        return False

    @property
    def block_table_token_alignment(self) -> int | None:
        return None

    @property
    def uses_slot_mapping(self) -> bool:
        return False

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        return self.blocks_per_request * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        return self.blocks_per_request


def page_spec(
    plan: MemoryPlan, kv_heads: int, head_size: int, host_pages: int | None, series: Series | None = None
) -> PageSpec:
    """What a layer's tokens take: our bytes instead of keys and values."""
    return PageSpec(
        block_size=plan.block_size,
        num_kv_heads=kv_heads,
        head_size=head_size,
        head_size_v=head_size,
        dtype=torch.uint8,
        state_content_bytes=plan.bytes_per_token,
        host_pages=host_pages,
        series=series,
    )


def request_spec(plan: MemoryPlan, kv_heads: int, head_size: int, host_pages: int | None) -> RequestSpec:
    """What a request takes in a layer, however many tokens it has."""
    return RequestSpec(
        block_size=plan.block_size,
        num_kv_heads=kv_heads,
        head_size=head_size,
        dtype=torch.uint8,
        state_content_bytes=plan.bytes_per_token,
        blocks_per_request=plan.blocks_per_request,
        host_pages=host_pages,
    )


def _write_pages(writer: Writer, num_pages: int, num_free: int) -> None:
    writer.gauges({"host_pages_in_use": num_pages - num_free, "host_pages_free": num_free})


class PageManager(FullAttentionManager):
    """Hands out the block ids that have a host page, or all where there is no host tier."""

    # A hit that ends inside a page would be copied on write, and vLLM copies device pages only.
    supports_fine_grained_hash_lookup = False

    def __init__(self, kv_cache_spec: PageSpec, block_pool: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, block_pool=block_pool, **kwargs)
        if kv_cache_spec.host_pages is not None:
            compat.remove_free_blocks(block_pool, kv_cache_spec.host_pages)
        if kv_cache_spec.series is not None and kv_cache_spec.host_pages is not None:
            writer = kv_cache_spec.series.writer("pages")
            compat.on_blocks_moved(block_pool, partial(_write_pages, writer))
            weakref.finalize(block_pool, writer.close)

    def _cache_partial_tail_block(self, request: Any, num_tokens: int) -> None:
        return


class RequestManager(SingleTypeKVCacheManager):
    """Gives every running request the same number of blocks, first those that no token can use."""

    def __init__(self, kv_cache_spec: RequestSpec, block_pool: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, block_pool=block_pool, **kwargs)
        self.blocks_per_request = kv_cache_spec.blocks_per_request
        first = len(block_pool.blocks) if kv_cache_spec.host_pages is None else kv_cache_spec.host_pages
        spare = range(first, len(block_pool.blocks))
        self.spare_pool = compat.make_block_pool(spare, block_pool.hash_block_size)

    def _num_missing(self, request_id: str) -> int:
        return self.blocks_per_request - len(self.req_to_blocks.get(request_id, ()))

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[Any], *args: Any, **kwargs: Any
    ) -> int:
        return max(0, self._num_missing(request_id) - self.spare_pool.get_num_free_blocks())

    def add_local_computed_blocks(self, request_id: str, new_computed_blocks: Sequence[Any], *args: Any) -> None:
        self.num_cached_block[request_id] = 0

    def allocate_external_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        return

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        self.num_cached_block[request_id] = 0
        missing = self._num_missing(request_id)
        if missing == 0:
            return []
        spare = min(missing, self.spare_pool.get_num_free_blocks())
        blocks = self.spare_pool.get_new_blocks(spare) + self.block_pool.get_new_blocks(missing - spare)
        self.req_to_blocks[request_id].extend(blocks)
        return blocks

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[tuple[list[Any], ...], int]:
        return tuple([] for _ in kv_cache_group_ids), max_length


compat.register_spec(PageSpec, PageManager)
compat.register_spec(RequestSpec, RequestManager)


def _tokens(vllm_config: Any, num_blocks: int) -> int | None:
    """What vLLM says that its cache holds, as the start-up line does; None for engines that run no method of ours."""
    engine = getattr(vllm_config.additional_config, "engine", None)
    return (
        None
        if engine is None
        else engine.capacity(vllm_config, num_blocks).tokens(vllm_config.model_config.max_model_len)
    )


compat.wrap_kv_cache_capacity(_tokens)
