"""Decode steps on the device: right, without a wait for the device, and as a replayed graph with padding."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from batches import make_batch
from hot_decoding import HotDecoding

from vllm_lrqk.methods.lrqk.settings import LRQKSettings

CONFIG = LRQKSettings(rank=8, page_size=16, top_k=24, recent_tokens=5, sink_tokens=3)
LENGTHS = [1, 15, 63, 211, 500]
# Tensor cores multiply float32 with the mantissa of TF32 unless told otherwise, as the kernels do.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
Pin = Callable[[torch.Tensor], torch.Tensor]


def make(operators: Any, device: torch.device, pin: Pin, config: LRQKSettings = CONFIG, **how: Any) -> HotDecoding:
    return HotDecoding(operators, make_batch(LENGTHS, config, **how), config, device, pin, padding=3)


def check(decoding: HotDecoding) -> None:
    torch.cuda.synchronize()
    error, error_of_other_choice = decoding.errors()
    assert error < ROUNDING[decoding.dtype]
    assert error_of_other_choice < 0.1
    assert (decoding.step.output[decoding.requests :] == 0).all()


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("factor_dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("residual", ["linear", "mean"])
def test_steps(
    operators: Any, device: torch.device, pin: Pin, dtype: torch.dtype, factor_dtype: str, residual: str
) -> None:
    config = replace(CONFIG, factor_dtype=factor_dtype, residual=residual)
    decoding = make(operators, device, pin, config, dtype=dtype)
    for _ in range(35):
        decoding.prepare()
        decoding.launch()
        check(decoding)
    filled = ~decoding.host_cpu.isnan()
    assert torch.equal(decoding.host[filled], decoding.host_cpu[filled])


@pytest.mark.parametrize("residual", ["linear", "mean", "none"])
@pytest.mark.parametrize(("group", "d"), [(1, 64), (4, 128), (7, 96), (8, 128)])
def test_shapes(operators: Any, device: torch.device, pin: Pin, residual: str, group: int, d: int) -> None:
    config = replace(CONFIG, residual=residual)
    decoding = make(operators, device, pin, config, group=group, d=d, dtype=torch.bfloat16)
    for _ in range(3):
        decoding.prepare()
        decoding.launch()
        check(decoding)


@pytest.mark.parametrize("residual", ["linear", "mean"])
def test_a_step_never_waits(
    operators: Any, device: torch.device, pin: Pin, residual: str, request: pytest.FixtureRequest
) -> None:
    decoding = make(operators, device, pin, replace(CONFIG, residual=residual))
    decoding.prepare()
    decoding.launch()
    decoding.prepare()
    request.getfixturevalue("no_synchronization")
    decoding.launch()
    torch.cuda.set_sync_debug_mode("default")
    check(decoding)


def test_the_check_for_waits_finds_one(device: torch.device, no_synchronization: None) -> None:
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device=device).item()


@pytest.mark.parametrize("residual", ["linear", "mean"])
def test_replayed_graph(operators: Any, device: torch.device, pin: Pin, residual: str) -> None:
    """Twenty replays over page boundaries; then a request leaves and its place becomes padding."""
    decoding = make(operators, device, pin, replace(CONFIG, residual=residual))
    decoding.prepare()
    decoding.launch()  # compiles what Triton needs
    check(decoding)
    decoding.prepare()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoding.launch()
    graph.replay()
    check(decoding)
    for _ in range(20):
        decoding.prepare()
        graph.replay()
        check(decoding)
    step, last = decoding.step, decoding.requests - 1
    step.seq_lens[last], step.slot_mapping[last], step.block_table[last] = 0, -1, 1 << 30
    step.query[last] = torch.nan
    graph.replay()
    torch.cuda.synchronize()
    assert (step.output[last:] == 0).all()
    assert not step.output.isnan().any()


def test_counters(operators: Any, device: torch.device, pin: Pin) -> None:
    config = LRQKSettings(rank=8, page_size=16, top_k=600, recent_tokens=5, sink_tokens=3)
    decoding = make(operators, device, pin, config)
    kv_heads = decoding.host.shape[1]
    decoding.prepare()
    decoding.launch()
    assert decoding.hot.counters.tolist() == [0, kv_heads * sum(LENGTHS)]
    decoding.prepare()
    decoding.launch()
    assert decoding.hot.counters.tolist() == [kv_heads * sum(n + 1 for n in LENGTHS), kv_heads * sum(LENGTHS)]
