"""Kernels on whole pages for CUDA devices, emulated: append, seal and prefill."""

import pytest
import torch
from emulated import emulated_operators
from interpreted import interpreted_kernels

interpreted_kernels("methods.lrqk.triton_attend")

from vllm_lrqk.core.prefill import flash_attention, prefill_attention  # noqa: E402
from vllm_lrqk.devices import cuda_prefill  # noqa: E402
from vllm_lrqk.methods.lrqk import cuda  # noqa: E402
from vllm_lrqk.methods.lrqk.format import FactorPages, PageFormat  # noqa: E402
from vllm_lrqk.methods.lrqk.kernels import PageKernels  # noqa: E402
from vllm_lrqk.methods.lrqk.seal import seal_pages  # noqa: E402
from vllm_lrqk.methods.lrqk.settings import LRQKSettings  # noqa: E402
from vllm_lrqk.methods.lrqk.torch_ops import kernels as torch_kernels  # noqa: E402

CONFIG = LRQKSettings(rank=8, page_size=16, top_k=24, recent_tokens=5, sink_tokens=3)


@pytest.fixture
def kernels() -> PageKernels:
    return cuda.kernels(emulated_operators())


def test_append_rows() -> None:
    host = torch.full((6, 2, 16, 2, 32), torch.nan)
    slot_mapping = torch.tensor([17, -1, 95, 32])
    wide = torch.randn(4, 3, 2, 32)  # key and value as vLLM hands them over: slices of one projection
    key, value = wide[:, 0], wide[:, 2]
    expected = host.clone()
    torch_kernels().append_rows(key, value, expected, slot_mapping)
    emulated_operators().cuda_append(key, value, host, slot_mapping, None, None, 0)
    torch.testing.assert_close(host, expected, equal_nan=True, rtol=0, atol=0)


def test_seal_pages(kernels: PageKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "SEAL_PAGES", 2)
    host = torch.randn(9, 2, 16, 2, 32)
    pages = torch.tensor([7, 2, 5])
    page_format = PageFormat(16, 32, 8)
    filled = [FactorPages(torch.zeros(9, 2, page_format.page_bytes, dtype=torch.uint8), page_format) for _ in range(2)]
    kernels.seal_pages(pages, host, filled[0], CONFIG)
    for start in (0, 2):  # the same batches: linear algebra rounds differently in larger ones
        part = slice(start, start + 2)
        seal_pages(pages[part], host, filled[1], CONFIG)
    assert torch.equal(filled[0].raw, filled[1].raw)
    assert filled[0].raw[pages].any()


@pytest.mark.parametrize("context_len", [0, 1, 31, 32, 47, 64, 100, 129])
def test_prefill_attention(kernels: PageKernels, context_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 32 tokens in two buffers: none, less than one, one, two and more."""
    monkeypatch.setattr(cuda_prefill, "TILE_TOKENS", 32)
    host = torch.randn(16, 2, 16, 2, 32)
    pages = torch.randperm(16)[:12].int()
    host[pages[-(-context_len // 16) :].long()] = torch.nan
    query, key, value = torch.randn(7, 6, 32), torch.randn(7, 2, 32), torch.randn(7, 2, 32)
    arguments = (query, key, value, host, pages, context_len, 32**-0.5)
    expected, output = torch.empty_like(query), torch.full_like(query, torch.nan)
    prefill_attention(*arguments, expected)
    kernels.prefill_attention(*arguments, output, attention=flash_attention)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_tiles_are_whole_and_in_order() -> None:
    host = torch.randn(16, 2, 16, 2, 32)
    pages = torch.randperm(16)[:7]
    stream = cuda_prefill.TileStream(emulated_operators(), host, pages, tile_pages=3)
    assert torch.equal(torch.cat([tile.clone() for tile in stream]), host[pages])
