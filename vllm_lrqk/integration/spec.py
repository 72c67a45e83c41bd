"""What vLLM's KV-cache memory is cut into: factor pages, and blocks of hot rows."""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_lrqk.config import LRQKConfig
from vllm_lrqk.hot_cache import HotFormat
from vllm_lrqk.page import PageFormat


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
