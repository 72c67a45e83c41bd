"""The kernels on whole pages on the device: append, seal and prefill."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cpu_kernel_cases import relative_error

from vllm_lrqk.core.host_pages import append_rows
from vllm_lrqk.core.prefill import prefill_attention
from vllm_lrqk.devices import cuda_prefill
from vllm_lrqk.devices.cuda_library import stream_handle
from vllm_lrqk.methods.lrqk import cuda, torch_ops
from vllm_lrqk.methods.lrqk.format import FactorPages, PageFormat
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

Pin = Callable[[torch.Tensor], torch.Tensor]
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def test_append_rows(operators: Any, device: torch.device, pin: Pin) -> None:
    host = torch.full((6, 2, 16, 2, 64), torch.nan)
    slot_mapping = torch.tensor([17, -1, 95, 32])
    wide = torch.randn(4, 3, 2, 64)
    expected = host.clone()
    append_rows(wide[:, 0], wide[:, 2], expected, slot_mapping)
    there, stream = wide.to(device), stream_handle(device)
    operators.cuda_append(there[:, 0], there[:, 2], pin(host), slot_mapping.to(device), None, None, stream)
    torch.cuda.synchronize()
    torch.testing.assert_close(host, expected, equal_nan=True, rtol=0, atol=0)


def test_seal_pages(operators: Any, device: torch.device, pin: Pin) -> None:
    """By what the pages say about scores: factors themselves may differ in sign and rounding."""
    config = LRQKSettings(rank=8, page_size=64)
    generator = torch.Generator().manual_seed(0)
    host = torch.randn(30, 2, 64, 2, 64, generator=generator)
    pages = torch.randperm(30, generator=generator)[:20]
    page_format = PageFormat(64, 64, 8)
    expected = FactorPages(torch.zeros(30, 2, page_format.page_bytes, dtype=torch.uint8), page_format)
    torch_ops.seal_pages(pages, host, expected, config)
    factors = FactorPages(torch.zeros_like(expected.raw, device=device), page_format)
    cuda.kernels(operators).seal_pages(pages.to(device), pin(host), factors, config)
    actual = FactorPages(factors.raw.cpu(), page_format)

    def product(side: FactorPages) -> torch.Tensor:
        scaled = side.projection[pages].float() * side.projection_scale[pages][..., None]
        return side.key_factor(pages).float() @ scaled  # [20, 2, 64, 64], X times A of each token

    assert relative_error(product(actual), product(expected)) < 0.02  # steps of int8
    torch.testing.assert_close(actual.value_mean[pages], expected.value_mean[pages], rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("context_len", [0, 1, 255, 256, 4096, 10_000])
def test_prefill_attention(
    operators: Any, device: torch.device, pin: Pin, context_len: int, dtype: torch.dtype
) -> None:
    host = torch.randn(64, 2, 256, 2, 64).to(dtype)
    pages = torch.randperm(64)[:50].int()
    query, key, value = (torch.randn(77, heads, 64).to(dtype) for heads in (8, 2, 2))
    expected = torch.empty(query.shape)
    plain = (query.float(), key.float(), value.float(), host.float(), pages, context_len, 64**-0.5)
    prefill_attention(*plain, expected)
    there = (query.to(device), key.to(device), value.to(device), pin(host), pages.to(device), context_len, 64**-0.5)
    for attention in {cuda_prefill.torch_attention, cuda_prefill.default_attention()}:
        output = torch.full_like(query, torch.nan, device=device)
        cuda.kernels(operators).prefill_attention(*there, output, attention=attention)
        assert relative_error(output.cpu(), expected) < ROUNDING[dtype]
