"""Random factor pages and host pages, and the formulas that reading them must give."""

import torch

from vllm_lrqk.methods.lrqk.format import FactorPages, PageFormat
from vllm_lrqk.methods.lrqk.seal import seal_pages
from vllm_lrqk.methods.lrqk.settings import LRQKSettings


def page_format(config: LRQKSettings, head_size: int) -> PageFormat:
    return PageFormat.from_config(config, head_size)


def empty_factors(config: LRQKSettings, head_size: int, num_pages: int, kv_heads: int, fill: int = 0xFF) -> FactorPages:
    """Factor pages full of one byte; 0xFF is NaN in every floating-point type."""
    form = page_format(config, head_size)
    return FactorPages(torch.full((num_pages, kv_heads, form.page_bytes), fill, dtype=torch.uint8), form)


def host_pages(keys: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
    """Host pages [M, KV, N, 2, d] of keys [M, KV, N, d]; values default to ones."""
    return torch.stack([keys, torch.ones_like(keys) if values is None else values], -2)


def sealed(keys: torch.Tensor, config: LRQKSettings, values: torch.Tensor | None = None) -> FactorPages:
    """Factor pages 0 ... M - 1 of keys [M, KV, N, d]."""
    factors = empty_factors(config, keys.shape[-1], keys.shape[0], keys.shape[1])
    seal_pages(torch.arange(len(keys)), host_pages(keys, values), factors, config)
    return factors


def page_scores(factors: FactorPages, query: torch.Tensor) -> torch.Tensor:
    """q . k of all tokens through the factors, in float64: [M, KV, T, N] from queries [T, d]."""
    pages = torch.arange(len(factors.raw))
    a = factors.key_factor(pages).double()  # [M, KV, N, r]
    projected = query.double() @ factors.projection.double().mT * factors.projection_scale.double()[..., None, :]
    return projected @ a.mT


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected|, Frobenius norms."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
