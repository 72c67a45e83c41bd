"""The table of CUDA kernels, with emulated and interpreted kernels: select, decode, append, seal and prefill."""

from dataclasses import replace

import pytest
import torch
from batches import make_batch
from cpu_kernel_cases import make_layer, relative_error
from emulated import emulated_operators
from interpreted import interpreted_kernels
from selections import HALF, assert_selects_like

interpreted_kernels("methods.lrqk.triton_attend")

from vllm_lrqk.core.attend import gather_rows  # noqa: E402
from vllm_lrqk.core.prefill import _flash, prefill_attention  # noqa: E402
from vllm_lrqk.devices import cuda_library, cuda_prefill  # noqa: E402
from vllm_lrqk.methods.lrqk import cuda  # noqa: E402
from vllm_lrqk.methods.lrqk.decode import attend_selection  # noqa: E402
from vllm_lrqk.methods.lrqk.format import FactorPages, PageFormat  # noqa: E402
from vllm_lrqk.methods.lrqk.kernels import Kernels  # noqa: E402
from vllm_lrqk.methods.lrqk.seal import query_grams, seal_pages  # noqa: E402
from vllm_lrqk.methods.lrqk.settings import LRQKConfig  # noqa: E402
from vllm_lrqk.methods.lrqk.torch_ops import kernels as torch_kernels  # noqa: E402

CONFIG = LRQKConfig(rank=8, page_size=16, top_k=24, recent_tokens=5, sink_tokens=3)


@pytest.fixture
def kernels() -> Kernels:
    return cuda.kernels(emulated_operators())


def test_select_keeps_and_grows_its_memory(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LRQKConfig(page_size=32, top_k=100)
    for lengths in ([300], [64, 700], [300], [1, 2, 3]):
        layer = make_layer(lengths, config)
        layer.block_table, layer.seq_lens = layer.block_table.long(), layer.seq_lens.long()
        actual = kernels.select(*layer.select_arguments())
        assert_selects_like(actual, torch_kernels().select(*layer.select_arguments()), layer, HALF)
    monkeypatch.setattr(cuda_library, "is_capturing", lambda device: True)
    kernels.select(*layer.select_arguments())
    with pytest.raises(RuntimeError, match="before capturing"):
        kernels.select(*make_layer([64, 700, 1, 5, 9], config).select_arguments())


def test_select_falls_back_where_the_kernels_do_not_reach(kernels: Kernels) -> None:
    layer = make_layer([300], LRQKConfig(page_size=32, top_k=100, rank=68), head_size=96)
    actual = kernels.select(*layer.select_arguments())
    assert_selects_like(actual, torch_kernels().select(*layer.select_arguments()), layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_attention(kernels: Kernels, dtype: torch.dtype) -> None:
    """Everything is attended, so that no choice between rows of equal weight shows."""
    batch = make_batch([1, 33, 200], LRQKConfig(rank=8, page_size=16, top_k=300), dtype=dtype)
    config = LRQKConfig(rank=8, page_size=16, top_k=300)
    arguments = (batch.query, batch.host, batch.factors, batch.block_table, batch.seq_lens, batch.scale, config)
    expected, output = torch.empty(batch.query.shape), torch.full(batch.query.shape, torch.nan)
    torch_kernels().decode_attention(*arguments, expected)
    attended = kernels.decode_attention(*arguments, output)
    assert attended.tolist() == [2, 66, 400]
    assert relative_error(output, expected) < (2e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("residual", ["linear", "mean"])
def test_decode_attention_with_residual(kernels: Kernels, residual: str) -> None:
    """Against attention to the rows that the kernels chose."""
    config = replace(CONFIG, residual=residual)
    batch = make_batch([1, 33, 200], config)
    arguments = (batch.query, batch.factors, batch.block_table, batch.seq_lens, batch.scale, config)
    output = torch.full(batch.query.shape, torch.nan)
    attended = kernels.decode_attention(batch.query, batch.host, *arguments[1:], output)
    selection = kernels.select(*arguments)
    assert attended.tolist() == (selection.rows >= 0).sum((1, 2)).tolist()
    rows_kv = gather_rows(batch.host, batch.block_table, selection.rows)
    expected = attend_selection(batch.query, rows_kv, selection, batch.factors, batch.block_table, batch.scale)
    assert relative_error(output, expected) < 2e-6


def test_append_rows(kernels: Kernels) -> None:
    host = torch.full((6, 2, 16, 2, 32), torch.nan)
    slot_mapping = torch.tensor([17, -1, 95, 32])
    wide = torch.randn(4, 3, 2, 32)  # key and value as vLLM hands them over: slices of one projection
    key, value = wide[:, 0], wide[:, 2]
    expected = host.clone()
    torch_kernels().append_rows(key, value, expected, slot_mapping)
    kernels.append_rows(key, value, host, slot_mapping)
    torch.testing.assert_close(host, expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("with_queries", [True, False])
def test_seal_pages(kernels: Kernels, with_queries: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "SEAL_PAGES", 2)
    host = torch.randn(9, 2, 16, 2, 32)
    pages = torch.tensor([7, 2, 5])
    grams = query_grams(torch.randn(48, 4, 32), 2, [0, 16, 32], [16, 32, 48]) if with_queries else None
    page_format = PageFormat(16, 32, 8)
    filled = [FactorPages(torch.zeros(9, 2, page_format.page_bytes, dtype=torch.uint8), page_format) for _ in range(2)]
    kernels.seal_pages(pages, host, filled[0], grams, CONFIG)
    for start in (0, 2):  # the same batches: linear algebra rounds differently in larger ones
        part = slice(start, start + 2)
        seal_pages(pages[part], host, filled[1], None if grams is None else grams[part], CONFIG)
    assert torch.equal(filled[0].raw, filled[1].raw)
    assert filled[0].raw[pages].any()


@pytest.mark.parametrize("context_len", [0, 1, 31, 32, 47, 64, 100, 129])
def test_prefill_attention(kernels: Kernels, context_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 32 tokens in two buffers: none, less than one, one, two and more."""
    monkeypatch.setattr(cuda_prefill, "TILE_TOKENS", 32)
    host = torch.randn(16, 2, 16, 2, 32)
    pages = torch.randperm(16)[:12].int()
    host[pages[-(-context_len // 16) :].long()] = torch.nan
    query, key, value = torch.randn(7, 6, 32), torch.randn(7, 2, 32), torch.randn(7, 2, 32)
    arguments = (query, key, value, host, pages, context_len, 32**-0.5)
    expected, output = torch.empty_like(query), torch.full_like(query, torch.nan)
    prefill_attention(*arguments, expected)
    kernels.prefill_attention(*arguments, output, attention=_flash)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_tiles_are_whole_and_in_order() -> None:
    host = torch.randn(16, 2, 16, 2, 32)
    pages = torch.randperm(16)[:7]
    stream = cuda_prefill.TileStream(emulated_operators(), host, pages, tile_pages=3)
    assert torch.equal(torch.cat([tile.clone() for tile in stream]), host[pages])


def test_missing_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "operators", lambda: None)
    with pytest.raises(RuntimeError, match="no CUDA kernels: install it with nvcc"):
        cuda.kernels.__wrapped__()
