"""The Triton attention kernel, interpreted on the CPU, against its plain torch form."""

from dataclasses import replace

import pytest
import torch
from addresses import host_addresses
from batches import Batch, make_batch
from interpreted import interpreted_kernels

from vllm_lrqk.core.attend import gather_rows
from vllm_lrqk.core.selection import Selection
from vllm_lrqk.methods.lrqk.decode import attend_selection
from vllm_lrqk.methods.lrqk.score import select
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

triton_attend = interpreted_kernels("methods.lrqk.triton_attend")
triton_parts = interpreted_kernels("devices.triton_parts")

CONFIG = LRQKSettings(rank=8, page_size=16, top_k=20, recent_tokens=5, sink_tokens=3)
LENGTHS = [1, 15, 33, 63, 100, 211]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def run(batch: Batch, selection: Selection, splits: int = 3, parts: int | None = None) -> torch.Tensor:
    requests, heads, d = batch.query.shape
    kv_heads = batch.host.shape[1]
    memory = triton_parts.allocate_parts(requests, kv_heads, parts or splits, heads // kv_heads, d, torch.device("cpu"))
    for tensor in (memory.output, memory.highest, memory.sums):
        tensor.fill_(torch.nan)
    address = host_addresses(selection.positions, batch.block_table, batch.host)
    output = torch.full_like(batch.query, torch.nan)
    arguments = (selection.residual, batch.factors, batch.block_table, selection.moment)
    if parts is None:
        triton_attend.attend_rows(batch.query, batch.host, address, batch.scale, memory, 0, splits, *arguments)
    else:  # every other row comes later, and the residual is a part of its own
        is_late = torch.arange(address.shape[-1]) % 2 == 1
        soon, late = address.masked_fill(is_late, -1), address.masked_fill(~is_late, -1)
        triton_attend.attend_rows(batch.query, batch.host, soon, batch.scale, memory, 0, splits)
        triton_attend.attend_rows(batch.query, batch.host, late, batch.scale, memory, splits, parts - splits - 1)
        triton_attend.attend_rows(batch.query, batch.host, None, batch.scale, memory, parts - 1, 1, *arguments)
    triton_parts.combine(memory, output)
    return output


def expected(batch: Batch, selection: Selection) -> torch.Tensor:
    rows_kv = gather_rows(batch.host, batch.block_table, selection.positions)
    return attend_selection(batch.query, rows_kv, selection, batch.factors, batch.block_table, batch.scale)


def selection_of(batch: Batch, config: LRQKSettings) -> Selection:
    return select(batch.query, batch.factors, batch.block_table, batch.seq_lens, batch.scale, config)


def check(batch: Batch, config: LRQKSettings, **how: int) -> None:
    selection = selection_of(batch, config)
    right = expected(batch, selection)
    error = (run(batch, selection, **how).float() - right).norm() / right.norm()
    assert error < ROUNDING[batch.query.dtype]


@pytest.mark.parametrize("residual", ["linear", "mean", "none"])
@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("d", [64, 96, 128])
def test_shapes(residual: str, group: int, d: int) -> None:
    config = replace(CONFIG, residual=residual)
    check(make_batch(LENGTHS, config, group=group, d=d), config)


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("factor_dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("residual", ["linear", "mean"])
def test_dtypes(dtype: torch.dtype, factor_dtype: str, residual: str) -> None:
    config = replace(CONFIG, factor_dtype=factor_dtype, residual=residual)
    check(make_batch(LENGTHS, config, dtype=dtype), config)


@pytest.mark.parametrize("rank", [4, 12, 20])
@pytest.mark.parametrize("pages", [63, 64, 65, 129])
def test_pages_beside_tiles(rank: int, pages: int) -> None:
    """Numbers of pages around those that a tile holds, and ranks that do not divide a tile."""
    config = replace(CONFIG, rank=rank, residual="linear")
    check(make_batch([16 * pages + 9, 40], config), config)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("residual", ["linear", "mean"])
def test_splits(splits: int, residual: str) -> None:
    config = replace(CONFIG, top_k=150, residual=residual)
    check(make_batch(LENGTHS, config), config, splits=splits)


def test_rows_that_come_later() -> None:
    config = replace(CONFIG, top_k=150)
    check(make_batch(LENGTHS, config), config, splits=2, parts=4)


@pytest.mark.parametrize("residual", ["linear", "mean"])
def test_request_without_rows_gets_zeros(residual: str) -> None:
    config = replace(CONFIG, residual=residual)
    batch = make_batch(LENGTHS, config)
    selection = selection_of(batch, config)
    assert selection.residual is not None
    selection.positions[2], selection.residual[2] = -1, -torch.inf
    output = run(batch, selection)
    assert (output[2] == 0).all()
    torch.testing.assert_close(output[3:], expected(batch, selection)[3:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("residual", ["linear", "mean"])
def test_huge_scores(residual: str) -> None:
    config = replace(CONFIG, residual=residual)
    batch = make_batch([211, 17], config)
    batch.query *= 1e3
    check(batch, config)


def test_splits_fill_the_device_and_have_work() -> None:
    assert triton_attend.num_splits(items=8, capacity=2372, multiprocessors=132) == 33
    assert triton_attend.num_splits(items=8, capacity=100, multiprocessors=132) == 2
    assert triton_attend.num_splits(items=1000, capacity=2372, multiprocessors=132) == 1
