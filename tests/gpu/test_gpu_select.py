"""Selection on the device, by the CUDA kernels, against the plain torch form on the CPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cpu_kernel_cases import DTYPES, Layer, make_layer
from selections import HALF, assert_selects_like

from vllm_lrqk.core.selection import Selection
from vllm_lrqk.methods.lrqk.cuda_select import SelectWorkspace
from vllm_lrqk.methods.lrqk.format import FactorPages
from vllm_lrqk.methods.lrqk.score import select
from vllm_lrqk.methods.lrqk.settings import LRQKSettings


def on_device(layer: Layer, device: torch.device) -> Layer:
    factors = FactorPages(layer.factors.raw.to(device), layer.factors.format)
    moved = {name: getattr(layer, name).to(device) for name in ("query", "block_table", "seq_lens")}
    return replace(layer, factors=factors, **moved)


@pytest.fixture
def run(operators: Any, device: torch.device) -> Any:
    def run_layer(layer: Layer) -> Selection:
        there = on_device(layer, device)
        requests, heads, _ = layer.query.shape
        kv_heads, pages = layer.host.shape[1], layer.block_table.shape[1]
        workspace = SelectWorkspace(operators, requests, pages, heads, kv_heads, layer.config, device)
        workspace._scratch.fill_(0xFF)
        for _ in range(2):  # the second call finds the state as the first has left it
            workspace._positions.fill_(-77)
            workspace._residual.fill_(torch.nan)
            workspace._moment.fill_(torch.nan)
            selection = workspace.select(*there.select_arguments()[:-1])
        left = (None if x is None else x.cpu() for x in (selection.residual, selection.moment))
        return Selection(selection.positions.cpu(), *left)

    return run_layer


def check(run: Any, layer: Layer) -> None:
    assert_selects_like(run(layer), select(*layer.select_arguments()), layer, HALF)


@pytest.mark.parametrize("factor_dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", ["linear", "mean"])
def test_ragged_batch(run: Any, dtype: torch.dtype, factor_dtype: str, residual: str) -> None:
    config = LRQKSettings(page_size=64, top_k=128, factor_dtype=factor_dtype, residual=residual)
    check(run, make_layer([1, 700, 63, 64, 2000, 260, 129], config, dtype))


@pytest.mark.parametrize(("head_size", "group"), [(64, 1), (96, 2), (128, 4), (256, 7), (128, 8), (64, 12)])
@pytest.mark.parametrize("rank", [4, 12, 16, 32, 64])
@pytest.mark.parametrize("residual", ["linear", "mean"])
def test_heads_and_rank(run: Any, head_size: int, group: int, rank: int, residual: str) -> None:
    config = LRQKSettings(page_size=32, top_k=100, rank=rank, residual=residual)
    check(run, make_layer([600], config, head_size=head_size, group=group))


@pytest.mark.parametrize("page_size", [16, 64, 128, 256, 1024])
@pytest.mark.parametrize("top_k", [1, 200, 9000])
@pytest.mark.parametrize("residual", ["linear", "mean"])
def test_page_size_and_top_k(run: Any, page_size: int, top_k: int, residual: str) -> None:
    check(run, make_layer([9000, 333], LRQKSettings(page_size=page_size, top_k=top_k, residual=residual)))


@pytest.mark.parametrize(("sink_tokens", "recent_tokens"), [(0, 1), (1, 17), (40, 64), (300, 5)])
@pytest.mark.parametrize("residual", ["linear", "mean", "none"])
def test_sink_and_recent(run: Any, sink_tokens: int, recent_tokens: int, residual: str) -> None:
    tokens = {"sink_tokens": sink_tokens, "recent_tokens": recent_tokens}
    check(run, make_layer([300, 32, 5, 41], LRQKSettings(page_size=16, top_k=50, residual=residual, **tokens)))


@pytest.mark.parametrize("residual", ["linear", "mean"])
def test_long_context(run: Any, residual: str) -> None:
    check(run, make_layer([100_000, 7], LRQKSettings(page_size=256, top_k=2048, residual=residual)))


def test_equal_weights(operators: Any, device: torch.device) -> None:
    layer = make_layer([60000], LRQKSettings(page_size=256, top_k=777), kv_heads=1, group=1)
    layer.query.zero_()
    there = on_device(layer, device)
    workspace = SelectWorkspace(operators, 1, layer.block_table.shape[1], 1, 1, layer.config, device)
    rows = workspace.select(*there.select_arguments()[:-1]).positions[0, 0]
    assert rows[:777].tolist() == list(range(4, 781))
