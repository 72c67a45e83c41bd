"""Block managers of the two KV-cache groups, registered with vLLM.

One space of block ids serves both tiers: id i is factor page i on the device and host page i in CPU memory.
Ids from `host_pages` on have no host page and can only hold hot rows.
"""

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SingleTypeKVCacheManager

from vllm_lrqk import compat
from vllm_lrqk.integration.spec import FactorSpec, HotSpec


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

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        return 0


compat.register_spec(FactorSpec, FactorPageManager)
compat.register_spec(HotSpec, HotRowManager)
