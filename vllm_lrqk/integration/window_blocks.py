"""Blocks of layers with a sliding window: vLLM's own manager over block ids that have no host page."""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from vllm_lrqk.integration import compat


@dataclass(frozen=True, kw_only=True)
class WindowSpec(SlidingWindowSpec):
    """Keys and values of a window as raw bytes: pages of the pool are of one type, which vLLM need not clear."""

    first_block: int
    """Block ids from this on are those of windows."""
    past_blocks: int
    """And those from this on are not."""


class WindowManager(SlidingWindowManager):
    """Frees blocks that leave the window and finds cached ones as vLLM does, among block ids of its own."""

    def __init__(self, kv_cache_spec: WindowSpec, block_pool: Any, enable_caching: bool, **kwargs: Any) -> None:
        ids = range(kv_cache_spec.first_block, min(kv_cache_spec.past_blocks, len(block_pool.blocks)))
        own = compat.shared_pool(block_pool, ids, enable_caching)
        super().__init__(kv_cache_spec, block_pool=own, enable_caching=enable_caching, **kwargs)
        self._more_than_all = block_pool.num_gpu_blocks + 1

    def get_num_blocks_to_allocate(self, *args: Any, **kwargs: Any) -> int:
        """None of the pool that all groups share; more than that has where those of the windows do not suffice."""
        needed = super().get_num_blocks_to_allocate(*args, **kwargs)
        return 0 if compat.claim_blocks(self.block_pool, self.kv_cache_group_id, needed) else self._more_than_all


def window_spec(
    window: int, block_size: int, kv_heads: int, head_size: int, dtype: torch.dtype, blocks: range
) -> WindowSpec:
    """What a layer with a window takes.

    Args:
        dtype: of keys and values.
        blocks: ids of all windows' blocks.
    """
    return WindowSpec(
        block_size=block_size,
        num_kv_heads=kv_heads,
        head_size=head_size,
        head_size_v=head_size,
        dtype=torch.uint8,
        state_content_bytes=2 * head_size * dtype.itemsize,
        sliding_window=window,
        first_block=blocks.start,
        past_blocks=blocks.stop,
    )


compat.register_spec(WindowSpec, WindowManager)
