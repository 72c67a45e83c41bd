"""What benchmarks/decode_cuda.py measures on: one layer with requests of one length, and what it takes in memory."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch

from vllm_lrqk.core.host_pages import allocate_host_pages
from vllm_lrqk.core.hot_rows import HotFormat
from vllm_lrqk.devices.pinned import chunk_rows
from vllm_lrqk.methods.lrqk.format import FactorPages, PageFormat
from vllm_lrqk.methods.lrqk.settings import LRQKSettings


@dataclass(frozen=True)
class Shape:
    """One layer and a batch."""

    length: int
    batch: int
    heads: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype

    def pages(self, config: LRQKSettings) -> int:
        """Pages of one request, with room for the tokens that the benchmark appends."""
        return -(-self.length // config.page_size) + 1

    def page_format(self, config: LRQKSettings) -> PageFormat:
        return PageFormat.from_config(config, self.head_size)

    def hot_format(self, config: LRQKSettings) -> HotFormat:
        return HotFormat(self.page_format(config).page_bytes, self.head_size, self.dtype)

    def host_bytes(self, config: LRQKSettings) -> int:
        """Keys and values in CPU memory; dense attention has as many on the GPU."""
        row = 2 * self.head_size * self.dtype.itemsize
        return self.batch * self.pages(config) * config.page_size * self.kv_heads * row

    def factor_bytes(self, config: LRQKSettings) -> int:
        """Factor pages that one step reads."""
        sealed = (self.length - 1) // config.page_size
        return self.batch * sealed * self.kv_heads * self.page_format(config).page_bytes

    def hot_bytes(self, config: LRQKSettings) -> int:
        """Hot slots of all requests."""
        form = self.hot_format(config)
        return self.batch * form.blocks_for(config.num_hot_rows) * self.kv_heads * form.block_bytes

    def device_bytes(self, config: LRQKSettings) -> int:
        """Factor pages, the open ones included, and hot slots."""
        per_page = self.kv_heads * self.page_format(config).page_bytes
        return self.batch * self.pages(config) * per_page + self.hot_bytes(config)


@dataclass
class Workload:
    """Tensors of one layer; keys are of low rank plus noise, so that a few tokens matter to each query."""

    shape: Shape
    config: LRQKSettings
    host: torch.Tensor
    """[num_pages, KV, N, 2, d], in CPU memory"""
    factors: FactorPages
    query: torch.Tensor
    """[B, H, d]"""
    key: torch.Tensor
    """[B, KV, d], of the current tokens"""
    value: torch.Tensor
    """[B, KV, d]"""
    block_table: torch.Tensor
    """int32 [B, P], pages in random order"""
    seq_lens: torch.Tensor
    """int32 [B]"""
    slot_mapping: torch.Tensor
    """int64 [B], where the current tokens are stored"""

    @property
    def scale(self) -> float:
        return self.shape.head_size**-0.5


PAGES_AT_ONCE = 64


def copy_pages(to: torch.Tensor, host: torch.Tensor) -> None:
    """Copy registered host pages to the device, none of the copies over the border of a registration."""
    rows = chunk_rows(host)
    for part, source in zip(to.split(rows), host.split(rows)):
        part.copy_(source, non_blocking=True)


def make_workload(
    shape: Shape,
    config: LRQKSettings,
    device: torch.device,
    seal: Callable[[torch.Tensor, torch.Tensor, FactorPages], None],
    prepare_host: Callable[[torch.Tensor], torch.Tensor] = lambda host: host,
    seed: int = 0,
) -> Workload:
    """Fill the pages of all requests.

    Args:
        device: of everything but the host pages.
        seal: factorises pages int64 [M] from the host pages.
        prepare_host: pins the host pages, once they are allocated.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    n, kv_heads, d = config.page_size, shape.kv_heads, shape.head_size
    pages = shape.pages(config)
    total = pages * shape.batch
    host = prepare_host(allocate_host_pages(total, kv_heads, n, d, shape.dtype))
    raw = torch.zeros(total, kv_heads, shape.page_format(config).page_bytes, dtype=torch.uint8, device=device)
    factors = FactorPages(raw, shape.page_format(config))
    basis = normal(kv_heads, 8, d)
    counts = [len(part) for chunk in host.split(chunk_rows(host)) for part in chunk.split(PAGES_AT_ONCE)]
    for start, count in zip(accumulate(counts, initial=0), counts):
        key = normal(count, kv_heads, n, 8) @ basis + 0.5 * normal(count, kv_heads, n, d)
        rows = torch.stack([key, normal(count, kv_heads, n, d)], 3).to(shape.dtype)
        host[start : start + count].copy_(rows)
        seal(torch.arange(start, start + count, device=device), host, factors)
    group = shape.heads // kv_heads
    interest = 0.4 * normal(shape.batch, kv_heads, group, 8) @ basis
    order = torch.randperm(total, generator=generator, device=device).int().view(shape.batch, pages)
    lens = torch.full((shape.batch,), shape.length, dtype=torch.int32, device=device)
    last = shape.length - 1
    slot_mapping = order[:, last // n].long() * n + last % n
    key, value = normal(2, shape.batch, kv_heads, d).to(shape.dtype)
    query = interest.flatten(1, 2).to(shape.dtype)
    return Workload(shape, config, host, factors, query, key, value, order, lens, slot_mapping)
