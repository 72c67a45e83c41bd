"""The hot tier on the device: resolve and fetch that never wait for the host.

The bytes of a hot block are those of vllm_lrqk/core/hot_rows.py. The clock and the page generations live on the device,
where `append` advances them, so that a captured graph can be replayed.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch

from vllm_lrqk.core.hot_rows import HotFormat, HotRows
from vllm_lrqk.devices.cuda_library import stream_handle


@dataclass
class Resolved:
    """Where the rows of one step are; memory of up to B requests, allocated once and shared by the layers.

    Capacity: R per (request, KV head).
    """

    address: torch.Tensor
    """int64 [B, KV, R], bytes from the hot blocks' first; -1 for rows that are missing and for the unused capacity."""
    miss_address: torch.Tensor
    """int64 [B, KV, R], hot slots of the missing rows, one after the other; -1 after the last."""
    miss_row: torch.Tensor
    """int64 [B, KV, R], page id * N + offset of each missing row; -1: the row of the current token."""
    miss_count: torch.Tensor
    """int32 [B, KV]"""
    _table: torch.Tensor
    """int32 [B * KV, a power of two]"""
    _age: torch.Tensor
    """int32 [B * KV, hot slots]"""
    _miss_place: torch.Tensor
    """int32 [B * KV, R]"""

    @classmethod
    def allocate(cls, requests: int, kv_heads: int, capacity: int, hot_slots: int, device: torch.device) -> "Resolved":
        """Memory for requests with up to `hot_slots` of them per KV head."""
        items = requests * kv_heads

        def wide() -> torch.Tensor:
            return torch.empty(requests, kv_heads, capacity, dtype=torch.int64, device=device)

        def narrow(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        table = 1 << (hot_slots * 4 // 3).bit_length()
        scratch = narrow(items, table), narrow(items, hot_slots), narrow(items, capacity)
        return cls(wide(), wide(), wide(), narrow(requests, kv_heads), *scratch)

    def first(self, requests: int) -> "Resolved":
        """The memory of the first requests."""
        items = requests * self.address.shape[1]
        by_request = (self.address, self.miss_address, self.miss_row, self.miss_count)
        by_item = (self._table, self._age, self._miss_place)
        return Resolved(*(x[:requests] for x in by_request), *(x[:items] for x in by_item))

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, f.name).nbytes for f in fields(self))


class DeviceHotCache(HotRows):
    """Hot slots of one layer on a CUDA device.

    Args:
        raw: uint8 [num_blocks, KV, block_bytes].
        num_host_pages: pages of the host tier.
        counters: int64 [2], zero: rows hit and rows missed, over all steps; the current tokens' rows are no misses.
    """

    def __init__(
        self,
        operators: Any,
        raw: torch.Tensor,
        hot_format: HotFormat,
        num_host_pages: int,
        counters: torch.Tensor | None = None,
    ) -> None:
        super().__init__(raw, hot_format, num_host_pages)
        self.operators = operators
        self.clock = torch.zeros(1, dtype=torch.int32, device=raw.device)
        self.counters = torch.zeros(2, dtype=torch.int64, device=raw.device) if counters is None else counters

    @property
    def rows(self) -> torch.Tensor:
        """All bytes as elements of the rows' dtype: the base of addresses."""
        return self.raw.view(self.format.dtype)

    def append(self, key: torch.Tensor, value: torch.Tensor, host: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Write a step's rows into the host pages, note the pages that begin anew and advance the clock.

        Args:
            key, value: [T, KV, d].
            host: [num_pages, KV, N, 2, d], memory that the device can write.
            slot_mapping: int64 [T], page id * N + offset; a negative one is skipped.
        """
        stream = stream_handle(key.device)
        self.operators.cuda_append(key, value, host, slot_mapping, self.generation, self.clock, stream)

    def resolve(
        self,
        rows: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        hot_blocks: torch.Tensor,
        page_size: int,
        resolved: Resolved,
    ) -> None:
        """Find the wanted rows among the slots and give slots to those that are missing; fills `resolved`.

        Args:
            rows: int32 [B, KV, R], token positions, -1 for none.
            block_table: int32 [B, P].
            seq_lens: int32 [B]; 0 for padding.
            hot_blocks: int32 [B, M], the request's hot blocks.
            resolved: memory of exactly B requests.
        """
        self.operators.cuda_resolve(
            rows,
            block_table,
            seq_lens,
            hot_blocks,
            self.raw,
            self.format.rows_per_block,
            self.format.row_bytes,
            self.generation,
            self.clock,
            page_size,
            resolved.address,
            resolved.miss_address,
            resolved.miss_row,
            resolved.miss_count,
            self.counters,
            resolved._table,
            resolved._age,
            resolved._miss_place,
            stream_handle(rows.device),
        )

    def fetch(self, host: torch.Tensor, key: torch.Tensor, value: torch.Tensor, resolved: Resolved) -> None:
        """Fill the hot slots of the missing rows, from the host pages or from the current tokens.

        Args:
            host: [num_pages, KV, N, 2, d], memory that the device can read.
            key, value: [B, KV, d], rows of the current tokens.
        """
        self.operators.cuda_fetch(
            host,
            self.raw,
            resolved.miss_address,
            resolved.miss_row,
            resolved.miss_count,
            key,
            value,
            stream_handle(resolved.address.device),
        )
