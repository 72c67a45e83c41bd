"""Whole decode steps of the CUDA path, with emulated and interpreted kernels, against the plain torch form."""

import pytest
import torch
from batches import make_batch
from emulated import emulated_operators
from interpreted import interpreted_kernels

interpreted_kernels("methods.lrqk.triton_attend")
from hot_decoding import HotDecoding  # noqa: E402

from vllm_lrqk.methods.lrqk.settings import LRQKSettings  # noqa: E402

CONFIG = LRQKSettings(rank=8, page_size=16, top_k=24, recent_tokens=5, sink_tokens=3)
LENGTHS = [1, 15, 63, 211]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
OTHER_CHOICE = 0.1
"""One of 24 rows that the torch form leaves to the residual."""


def make(config: LRQKSettings = CONFIG, dtype: torch.dtype = torch.float32, **shape: int) -> HotDecoding:
    batch = make_batch(LENGTHS, config, dtype=dtype, **shape)
    return HotDecoding(emulated_operators(), batch, config, torch.device("cpu"))


def check_steps(decoding: HotDecoding, steps: int) -> None:
    for _ in range(steps):
        decoding.prepare()
        decoding.launch()
        error, error_of_other_choice = decoding.errors()
        assert error < ROUNDING[decoding.dtype]
        assert error_of_other_choice < OTHER_CHOICE
        output = decoding.step.output
        assert (output[decoding.requests :] == 0).all()


def test_steps_over_a_page_boundary() -> None:
    decoding = make()
    check_steps(decoding, 18)
    filled = ~decoding.host_cpu.isnan()
    assert torch.equal(decoding.host[filled], decoding.host_cpu[filled])
    hits, misses = decoding.hot.counters.tolist()
    assert hits > 0
    assert misses > 0
    assert int(decoding.hot.clock) == 18


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    check_steps(make(dtype=dtype), 2)


@pytest.mark.parametrize("residual", ["linear", "mean", "none"])
@pytest.mark.parametrize(("group", "d"), [(1, 64), (4, 128), (7, 96)])
def test_shapes(residual: str, group: int, d: int) -> None:
    config = LRQKSettings(rank=8, page_size=16, top_k=24, recent_tokens=5, sink_tokens=3, residual=residual)
    check_steps(make(config, group=group, d=d), 3)


def test_only_new_rows_miss_when_everything_is_attended() -> None:
    """The second step finds all rows of the first; the current token's row is no miss."""
    config = LRQKSettings(rank=8, page_size=16, top_k=300, recent_tokens=5, sink_tokens=3)
    decoding = make(config)
    check_steps(decoding, 1)
    kv_heads = decoding.host.shape[1]
    first = [0, kv_heads * sum(LENGTHS)]
    assert decoding.hot.counters.tolist() == first
    check_steps(decoding, 1)
    assert decoding.hot.counters.tolist() == [kv_heads * sum(length + 1 for length in LENGTHS), first[1]]
