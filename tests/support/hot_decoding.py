"""Decode steps of a batch through the device's hot cache, on any device, against the torch form on the CPU."""

from dataclasses import dataclass
from typing import Any

import torch
from batches import Batch
from pages import page_format

from vllm_lrqk.core.attend import gather_rows
from vllm_lrqk.core.hot_rows import HotFormat
from vllm_lrqk.core.selection import Selection
from vllm_lrqk.devices.cuda_hot_rows import DeviceHotCache
from vllm_lrqk.methods.lrqk.cuda_decode import DecodePath
from vllm_lrqk.methods.lrqk.decode import attend_selection, decode_attention
from vllm_lrqk.methods.lrqk.format import FactorPages
from vllm_lrqk.methods.lrqk.seal import seal_pages
from vllm_lrqk.methods.lrqk.settings import LRQKSettings


@dataclass
class DeviceStep:
    """What one step reads and writes on the device; the same memory for every step, as a captured graph needs it."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    hot_blocks: torch.Tensor
    seq_lens: torch.Tensor
    output: torch.Tensor


class HotDecoding:
    """Requests of a batch that decode token by token, and `padding` more that are none.

    Args:
        device: of everything but the host pages, which stay where `pin` leaves them.
        pin: makes the host pages readable for the device.
        room: tokens that each request may add.
    """

    def __init__(
        self,
        operators: Any,
        batch: Batch,
        config: LRQKSettings,
        device: torch.device,
        pin: Any = lambda host: host,
        room: int = 40,
        padding: int = 1,
        seed: int = 0,
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.batch, self.config, self.device = batch, config, device
        n, (requests, heads, d) = config.page_size, batch.query.shape
        kv_heads, self.dtype = batch.host.shape[1], batch.host.dtype
        self.requests, self.total = requests, requests + padding
        self.lens = batch.seq_lens.clone()
        more = -(-room // n) + 1
        first_new = len(batch.host)
        new_pages = requests * more
        self.host_cpu = torch.cat(
            [batch.host, torch.full((new_pages, *batch.host.shape[1:]), torch.nan, dtype=self.dtype)]
        )
        raw = torch.cat([batch.factors.raw, torch.full((new_pages, *batch.factors.raw.shape[1:]), 0xFF).byte()])
        self.factors_cpu = FactorPages(raw, batch.factors.format)
        width = batch.block_table.shape[1] + more
        self.table = torch.full((requests, width), int(batch.block_table[0, -1]), dtype=torch.int32)
        for b in range(requests):
            used = -(-int(self.lens[b]) // n)
            self.table[b, :used] = batch.block_table[b, :used]
            self.table[b, used : used + more] = torch.arange(more) + first_new + b * more

        hot_format = HotFormat(page_format(config, d).page_bytes, d, self.dtype)
        per_request = hot_format.blocks_for(config.num_hot_rows)
        # Blocks that other requests have left behind.
        blocks = self.total * per_request + 3
        hot_raw = torch.randint(0, 256, (blocks, kv_heads, hot_format.block_bytes), generator=self.generator).byte()
        order = torch.randperm(blocks, generator=self.generator)[: self.total * per_request].int()
        self.host = pin(self.host_cpu.clone())
        self.factors = FactorPages(raw.to(device), batch.factors.format)
        self.hot = DeviceHotCache(operators, hot_raw.to(device), hot_format, len(self.host_cpu))
        self.path = DecodePath(operators, self.total, width, heads, kv_heads, hot_format, per_request, config, device)

        def on_device(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.step = DeviceStep(
            on_device(self.total, heads, d, dtype=self.dtype),
            on_device(self.total, kv_heads, d, dtype=self.dtype),
            on_device(self.total, kv_heads, d, dtype=self.dtype),
            on_device(self.total, dtype=torch.int64),
            on_device(self.total, width, dtype=torch.int32),
            order.view(self.total, per_request).to(device),
            on_device(self.total, dtype=torch.int32),
            on_device(self.total, heads, d, dtype=self.dtype),
        )
        self.step.block_table.fill_(1 << 30)  # padding's pages mean nothing
        self.step.block_table[:requests] = self.table.to(device)
        self.step.slot_mapping.fill_(-1)

    def prepare(self) -> None:
        """Draw the next tokens, append them to the CPU's pages, seal the full ones, and fill the step."""
        n, (_, heads, d) = self.config.page_size, self.batch.query.shape
        kv_heads = self.host_cpu.shape[1]
        normal = [
            torch.randn(self.requests, count, d, generator=self.generator).to(self.dtype)
            for count in (heads, kv_heads, kv_heads)
        ]
        query, key, value = normal
        self.lens += 1
        page = self.table[torch.arange(self.requests), ((self.lens - 1) // n).long()]
        offset = (self.lens - 1) % n
        self.host_cpu[page.long(), :, offset.long()] = torch.stack([key, value], 2)
        filled = page[offset == n - 1].long()
        if len(filled):
            seal_pages(filled, self.host_cpu, self.factors_cpu, self.config)
            self.factors.raw[filled.to(self.device)] = self.factors_cpu.raw[filled].to(self.device)
        step, count = self.step, self.requests
        step.query[:count], step.key[:count], step.value[:count] = (x.to(self.device) for x in (query, key, value))
        step.slot_mapping[:count] = (page.long() * n + offset.long()).to(self.device)
        step.seq_lens[:count] = self.lens.int().to(self.device)
        step.output.fill_(torch.nan)

    def launch(self) -> None:
        """Run the step."""
        s = self.step
        self.selection = self.path.step(
            s.query,
            s.key,
            s.value,
            s.slot_mapping,
            self.host,
            self.factors,
            self.hot,
            s.block_table,
            s.hot_blocks,
            s.seq_lens,
            self.batch.scale,
            s.output,
        )

    def errors(self) -> tuple[float, float]:
        """Relative error of the output: against attention to the rows that the device chose, and to the CPU's choice.

        The second is larger: rows of nearly equal weight change places where scores differ in their last bits.
        """
        query = self.step.query[: self.requests].cpu()
        rows = self.selection.positions[: self.requests].cpu()
        left = (self.selection.residual, self.selection.moment)
        chosen = Selection(rows, *(None if x is None else x[: self.requests].cpu() for x in left))
        rows_kv = gather_rows(self.host_cpu, self.table, rows)
        same = attend_selection(query, rows_kv, chosen, self.factors_cpu, self.table, self.batch.scale)
        own = torch.empty_like(same)
        arguments = (query, self.host_cpu, self.factors_cpu, self.table, self.lens, self.batch.scale, self.config)
        decode_attention(*arguments, own)
        output = self.step.output[: self.requests].cpu().float()
        return tuple(float((output - x).norm() / x.norm()) for x in (same, own))  # type: ignore[return-value]
