"""One decode step of one layer on a CUDA device, from the new rows to the attention output.

    append -> select -> resolve -> fetch (copy stream)
                 |        |         \\
                 |        attend to what is there -> attend to what was fetched -> combine
                 |                                                              /
                 attend to the residual (side stream) --------------------------

Nothing waits for the host, every size follows from the block table's and the batch's shape, and a request of length 0
is padding: a step can be captured into a CUDA graph and replayed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_lrqk.core.hot_rows import HotFormat
from vllm_lrqk.core.selection import Selection
from vllm_lrqk.devices import triton_parts
from vllm_lrqk.devices.cuda_hot_rows import DeviceHotCache, Resolved
from vllm_lrqk.devices.cuda_library import multiprocessors
from vllm_lrqk.methods.lrqk import triton_attend
from vllm_lrqk.methods.lrqk.cuda_select import SelectWorkspace
from vllm_lrqk.methods.lrqk.format import FactorPages
from vllm_lrqk.methods.lrqk.settings import LRQKSettings


class DecodePath:
    """Memory and launches of decode steps, shared by all layers of one shape.

    Args:
        hot_blocks_per_request: M, hot blocks that each request owns.
    """

    def __init__(
        self,
        operators: Any,
        max_requests: int,
        max_pages: int,
        heads: int,
        kv_heads: int,
        hot_format: HotFormat,
        hot_blocks_per_request: int,
        config: LRQKSettings,
        device: torch.device,
    ) -> None:
        self.config = config
        self.heads, self.kv_heads, self.head_size = heads, kv_heads, hot_format.head_size
        self.hot_blocks_per_request = hot_blocks_per_request
        self.workspace = SelectWorkspace(operators, max_requests, max_pages, heads, kv_heads, config, device)
        hot_slots = hot_blocks_per_request * hot_format.rows_per_block
        self.resolved = Resolved.allocate(max_requests, kv_heads, config.attended_rows, hot_slots, device)
        self.multiprocessors = multiprocessors(device)
        self.copy_stream, self.side_stream = (
            torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(2)
        )
        self._kinds_of_parts = 2 if config.residual == "none" else 3
        most = max(requests * self._splits(requests) for requests in range(1, max_requests + 1))
        self._parts = triton_parts.allocate_parts(
            most, kv_heads, self._kinds_of_parts, heads // kv_heads, hot_format.head_size, device
        )

    def _splits(self, requests: int) -> int:
        return triton_attend.num_splits(requests * self.kv_heads, self.config.attended_rows, self.multiprocessors)

    def step(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        slot_mapping: torch.Tensor,
        host: torch.Tensor,
        factors: FactorPages,
        hot: DeviceHotCache,
        block_table: torch.Tensor,
        hot_blocks: torch.Tensor,
        seq_lens: torch.Tensor,
        scale: float,
        output: torch.Tensor,
    ) -> Selection:
        """Store one token per request and attend; returns what it attended to, valid until the next step.

        A page that these tokens fill has to be sealed before the next step.

        Args:
            slot_mapping: int64 [B], page id * N + offset of each token; negative for padding.
            others: see `attend`.
        """
        hot.append(key, value, host, slot_mapping)
        return self.attend(query, key, value, host, factors, hot, block_table, hot_blocks, seq_lens, scale, output)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        host: torch.Tensor,
        factors: FactorPages,
        hot: DeviceHotCache,
        block_table: torch.Tensor,
        hot_blocks: torch.Tensor,
        seq_lens: torch.Tensor,
        scale: float,
        output: torch.Tensor,
    ) -> Selection:
        """Attend with one token per request, whose row is stored already.

        Args:
            query, output: [B, H, d].
            key, value: [B, KV, d], the tokens' rows once more: they need not come from the host.
            host: [num_pages, KV, N, 2, d], memory that the device can read and write.
            block_table: int32 [B, P].
            hot_blocks: int32 [B, M].
            seq_lens: int32 [B], the current token included; 0 for padding, whose output is zero.
        """
        selection = self.workspace.select(query, factors, block_table, seq_lens, scale)
        splits = self._splits(len(query))
        parts = self._parts.cut(len(query) * self.kv_heads, self._kinds_of_parts * splits)
        if selection.residual is not None:
            left = (selection.residual, factors, block_table, selection.moment)
            with self._beside(self.side_stream, query.device):
                triton_attend.attend_rows(query, hot.rows, None, scale, parts, 2 * splits, splits, *left)
        resolved = self.resolved.first(len(query))
        hot.resolve(selection.positions, block_table, seq_lens, hot_blocks, self.config.page_size, resolved)
        with self._beside(self.copy_stream, query.device):
            hot.fetch(host, key, value, resolved)
        triton_attend.attend_rows(query, hot.rows, resolved.address, scale, parts, 0, splits)
        self._join(self.copy_stream, query.device)
        triton_attend.attend_rows(query, hot.rows, resolved.miss_address, scale, parts, splits, splits)
        self._join(self.side_stream, query.device)
        triton_parts.combine(parts, output)
        return selection

    @contextmanager
    def _beside(self, stream: Any, device: torch.device) -> Iterator[None]:
        """Launch on another stream, behind what was launched so far; in place where there are no streams."""
        if stream is None:
            yield
            return
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield

    def _join(self, stream: Any, device: torch.device) -> None:
        """Launch nothing more before what was launched beside is done."""
        if stream is not None:
            torch.cuda.current_stream(device).wait_stream(stream)

    def warm_up(self, host: torch.Tensor, factors: FactorPages, hot: DeviceHotCache, scale: float) -> None:
        """Run steps of padding alone, one for each program that Triton compiles for some number of requests."""
        compiled: set[int] = set()
        for requests in range(1, self.workspace.max_requests + 1):
            program = triton_parts.parts_block(self._kinds_of_parts * self._splits(requests))
            if program in compiled:
                continue
            compiled.add(program)

            def zeros(*shape: int, dtype: torch.dtype, requests: int = requests) -> torch.Tensor:
                return torch.zeros(requests, *shape, dtype=dtype, device=factors.raw.device)

            query = zeros(self.heads, self.head_size, dtype=host.dtype)
            row = zeros(self.kv_heads, self.head_size, dtype=host.dtype)
            table = zeros(self.workspace.max_pages, dtype=torch.int32)
            hot_blocks = zeros(self.hot_blocks_per_request, dtype=torch.int32)
            lens = zeros(dtype=torch.int32)
            self.attend(query, row, row, host, factors, hot, table, hot_blocks, lens, scale, torch.empty_like(query))


STEP_MEMORY_BYTES = 512 << 20


def requests_at_once(
    operators: Any,
    max_requests: int,
    max_pages: int,
    heads: int,
    kv_heads: int,
    hot_slots: int,
    config: LRQKSettings,
    memory_bytes: int = STEP_MEMORY_BYTES,
) -> int:
    """How many requests one `DecodePath` should serve at a time, so that its memory stays within `memory_bytes`.

    Args:
        hot_slots: of one request and KV head.
    """
    meta = torch.device("meta")
    one = SelectWorkspace(operators, 1, max_pages, heads, kv_heads, config, meta).nbytes
    one += Resolved.allocate(1, kv_heads, config.attended_rows, hot_slots, meta).nbytes
    count = max(1, min(max_requests, memory_bytes // one))
    # Parts of the block table start at multiples of 16 bytes, whatever its width: Triton compiles others anew.
    return count if count < 4 or count == max_requests else count // 4 * 4
