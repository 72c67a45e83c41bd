"""Paged layers for the kernel tests: everything that a kernel must not read is NaN."""

from dataclasses import dataclass

import torch

from vllm_lrqk.devices import cpu
from vllm_lrqk.methods.lrqk.format import FactorPages, PageFormat
from vllm_lrqk.methods.lrqk.seal import seal_pages
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

INSTRUCTION_SETS = cpu.instruction_sets()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Layer:
    """One layer with the pages of some requests, in random order."""

    query: torch.Tensor
    host: torch.Tensor
    factors: FactorPages
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    scale: float
    config: LRQKSettings

    def decode_arguments(self) -> tuple:
        return self.query, self.host, self.factors, self.block_table, self.seq_lens, self.scale, self.config

    def select_arguments(self) -> tuple:
        return self.query, self.factors, self.block_table, self.seq_lens, self.scale, self.config


def make_layer(
    lengths: list[int],
    config: LRQKSettings,
    dtype: torch.dtype = torch.float32,
    kv_heads: int = 2,
    group: int = 4,
    head_size: int = 64,
    seed: int = 0,
) -> Layer:
    """Keys of low rank plus noise, so that scores spread over several powers of e."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    n, batch = config.page_size, len(lengths)
    num_pages = [-(-length // n) for length in lengths]
    pool = sum(num_pages) + 2
    page_format = PageFormat.from_config(config, head_size)
    host = torch.full((pool, kv_heads, n, 2, head_size), torch.nan, dtype=dtype)
    raw = torch.full((pool, kv_heads, page_format.page_bytes), 0xFF, dtype=torch.uint8)  # NaN as float and bfloat16
    factors = FactorPages(raw, page_format)
    order = (torch.randperm(pool - 1, generator=generator) + 1).tolist()
    block_table = torch.zeros(batch, max(num_pages), dtype=torch.int32)  # page 0 stays NaN
    basis = normal(kv_heads, 6, head_size)
    for row, (length, count) in enumerate(zip(lengths, num_pages)):
        pages, order = order[:count], order[count:]
        block_table[row, :count] = torch.tensor(pages)
        key = torch.einsum("nkr,krd->nkd", normal(length, kv_heads, 6), basis) + 0.5 * normal(
            length, kv_heads, head_size
        )
        rows = torch.stack([key, normal(length, kv_heads, head_size)], 2).to(dtype)
        for i, page in enumerate(pages):
            part = rows[i * n : (i + 1) * n].transpose(0, 1)
            host[page, :, : part.shape[1]] = part
        sealed = torch.tensor(pages[: length // n], dtype=torch.int64)
        if len(sealed):
            seal_pages(sealed, host, factors, config)
    query = 0.4 * torch.einsum("bkgr,krd->bkgd", normal(batch, kv_heads, group, 6), basis)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    return Layer(query.flatten(1, 2).to(dtype), host, factors, block_table, seq_lens, head_size**-0.5, config)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))
