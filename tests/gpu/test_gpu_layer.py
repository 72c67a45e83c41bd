"""The layer state as vLLM drives it: prompts, decode steps in graphs, pages that change hands, padding."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from served_layers import ServedLayers, serve

from vllm_lrqk.core.counters import Counters
from vllm_lrqk.core.step import Step, filled_pages
from vllm_lrqk.devices import triton_parts
from vllm_lrqk.methods.lrqk import triton_attend
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

SPARSE = LRQKSettings(rank=4, page_size=16, top_k=12, recent_tokens=3, sink_tokens=2)
COVERING = LRQKSettings(rank=4, page_size=16, top_k=80, recent_tokens=3, sink_tokens=2)
# Sums in another order; in 16 bits also the rounding of probabilities and outputs, of either side.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2**-6, torch.float16: 2**-9}
Pin = Callable[[torch.Tensor], torch.Tensor]


class CapturedLayers(ServedLayers):
    """Runs captured steps as CUDA graphs."""

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def capture(self, requests: int) -> Step:
        step = super().capture(requests)
        self.layer.warm_up()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            super().replay(step)
        self.graphs[id(step)] = graph
        return step

    def replay(self, captured: Step) -> None:
        graph = self.graphs.get(id(captured))
        if graph is None:
            super().replay(captured)
        else:
            graph.replay()


@pytest.mark.parametrize("kind", [ServedLayers, CapturedLayers], ids=["eager", "graph"])
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_covering_selection(
    operators: Any, device: torch.device, pin: Pin, kind: type[ServedLayers], dtype: torch.dtype
) -> None:
    layers = kind(operators, COVERING, device, pin, kv_heads=2, group=4, d=64, dtype=dtype)
    serve(layers, ROUNDING[dtype])


@pytest.mark.parametrize("kind", [ServedLayers, CapturedLayers], ids=["eager", "graph"])
@pytest.mark.parametrize("residual", ["linear", "mean"])
def test_sparse_selection(
    operators: Any, device: torch.device, pin: Pin, kind: type[ServedLayers], residual: str
) -> None:
    """One of 12 rows may change places with one of nearly equal weight; two requests are served at a time."""
    layers = kind(operators, replace(SPARSE, residual=residual), device, pin, at_once=2)
    serve(layers, 0.1)
    assert (layers.hot.counters > 0).all()


def test_serving_never_waits(operators: Any, device: torch.device, pin: Pin, request: pytest.FixtureRequest) -> None:
    layers = CapturedLayers(operators, SPARSE, device, pin)
    a, b = layers.admit(), layers.admit()
    layers.run([(a, 31), (b, 12)])
    captured = layers.capture(4)
    layers.run_captured(captured, [a, b])
    counters = Counters(("rows_hit", "rows_missed"), 1, device)
    step = layers.prepare([(a, 1), (b, 1)])
    in_use = torch.tensor(7, device=device)
    request.getfixturevalue("no_synchronization")
    layers.seal(step)
    layers.replay(captured)
    filled_pages(step)
    counters.start_copy(in_use)
    counters.arrived()
    torch.cuda.set_sync_debug_mode("default")
    assert layers.error() < 0.1
    torch.cuda.synchronize()
    assert counters._copy.tolist() == [0, 0, 7]


def test_prefill_never_waits(operators: Any, device: torch.device, pin: Pin, request: pytest.FixtureRequest) -> None:
    layers = ServedLayers(operators, SPARSE, device, pin)
    a = layers.admit()
    layers.run([(a, 31)])
    step = layers.prepare([(a, 33)])
    request.getfixturevalue("no_synchronization")
    layers.replay(step)
    torch.cuda.set_sync_debug_mode("default")
    assert layers.error() < ROUNDING[torch.float32]


@pytest.mark.parametrize("residual", ["linear", "mean"])
def test_warm_up_compiles_for_every_number_of_requests(
    operators: Any, device: torch.device, pin: Pin, residual: str
) -> None:
    """A capture must find its programs compiled."""
    layers = ServedLayers(operators, replace(SPARSE, residual=residual), device, pin)
    kernels = (triton_attend._attend_kernel, triton_parts._combine_kernel)

    def compiled() -> list[int]:
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    layers.layer.warm_up()
    before = compiled()
    assert all(before)
    for requests in range(1, 5):
        layers.replay(layers.capture(requests))
    assert compiled() == before
