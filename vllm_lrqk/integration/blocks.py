"""What vLLM's KV-cache memory is cut into, factor pages and blocks of hot rows, and who hands them out.

One space of block ids serves both tiers: id i is factor page i on the device and host page i in CPU memory.
Ids from `host_pages` on have no host page and can only hold hot rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_lrqk.core.hot_rows import HotFormat
from vllm_lrqk.integration import compat
from vllm_lrqk.methods.lrqk.format import PageFormat
from vllm_lrqk.methods.lrqk.settings import LRQKConfig


def page_format(config: LRQKConfig, head_size: int) -> PageFormat:
    """The factor page format of a layer."""
    return PageFormat.from_config(config, head_size)


@dataclass(frozen=True, kw_only=True)
class FactorSpec(FullAttentionSpec):
    """Factor pages: raw bytes, one page of them per block and KV head."""

    host_pages: int = 0
    """Block ids below this have a host page; only they can hold tokens."""

    @classmethod
    def merge(cls, specs: list["FactorSpec"]) -> "FactorSpec":
        assert all(spec == specs[0] for spec in specs), "layers of one group must have equal factor pages"
        return specs[0]


@dataclass(frozen=True, kw_only=True)
class HotSpec(AttentionSpec):
    """Hot rows: a constant number of blocks per request, each as large as a factor page."""

    blocks_per_request: int
    host_pages: int

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


def factor_spec(spec: FullAttentionSpec, config: LRQKConfig, host_pages: int) -> FactorSpec:
    """vLLM's spec of a layer, with our bytes instead of keys and values."""
    return FactorSpec(
        block_size=spec.block_size,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        head_size_v=spec.head_size_v,
        dtype=torch.uint8,
        state_content_bytes=page_format(config, spec.head_size).bytes_per_token,
        host_pages=host_pages,
    )


def hot_format(config: LRQKConfig, head_size: int, dtype: torch.dtype) -> HotFormat:
    """The format of a hot block: as many bytes per KV head as a factor page."""
    return HotFormat(page_format(config, head_size).page_bytes, head_size, dtype)


def hot_spec(config: LRQKConfig, kv_heads: int, head_size: int, dtype: torch.dtype, host_pages: int) -> HotSpec:
    """The spec of a layer's hot rows; `dtype` is that of the keys and values."""
    return HotSpec(
        block_size=config.page_size,
        num_kv_heads=kv_heads,
        head_size=head_size,
        dtype=torch.uint8,
        state_content_bytes=page_format(config, head_size).bytes_per_token,
        blocks_per_request=hot_format(config, head_size, dtype).blocks_for(config.num_hot_rows),
        host_pages=host_pages,
    )


class FactorPageManager(FullAttentionManager):
    """Hands out the block ids that have a host page."""

    # A hit that ends inside a page would be copied on write, and vLLM copies device pages only.
    supports_fine_grained_hash_lookup = False

    def __init__(self, kv_cache_spec: FactorSpec, block_pool: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, block_pool=block_pool, **kwargs)
        compat.remove_free_blocks(block_pool, kv_cache_spec.host_pages)

    def _cache_partial_tail_block(self, request: Any, num_tokens: int) -> None:
        return


class HotRowManager(SingleTypeKVCacheManager):
    """Gives every running request the same number of blocks for its hot rows."""

    def __init__(self, kv_cache_spec: HotSpec, block_pool: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, block_pool=block_pool, **kwargs)
        self.blocks_per_request = kv_cache_spec.blocks_per_request
        hot_only = range(kv_cache_spec.host_pages, len(block_pool.blocks))
        self.hot_only_pool = compat.make_block_pool(hot_only, block_pool.hash_block_size)

    def _num_missing(self, request_id: str) -> int:
        return self.blocks_per_request - len(self.req_to_blocks.get(request_id, ()))

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[Any], *args: Any, **kwargs: Any
    ) -> int:
        return max(0, self._num_missing(request_id) - self.hot_only_pool.get_num_free_blocks())

    def add_local_computed_blocks(self, request_id: str, new_computed_blocks: Sequence[Any], *args: Any) -> None:
        self.num_cached_block[request_id] = 0

    def allocate_external_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        return

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        self.num_cached_block[request_id] = 0
        missing = self._num_missing(request_id)
        if missing == 0:
            return []
        hot_only = min(missing, self.hot_only_pool.get_num_free_blocks())
        blocks = self.hot_only_pool.get_new_blocks(hot_only) + self.block_pool.get_new_blocks(missing - hot_only)
        self.req_to_blocks[request_id].extend(blocks)
        return blocks

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[tuple[list[Any], ...], int]:
        return tuple([] for _ in kv_cache_group_ids), max_length


compat.register_spec(FactorSpec, FactorPageManager)
compat.register_spec(HotSpec, HotRowManager)
