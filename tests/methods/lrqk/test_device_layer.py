"""The layer with the CUDA decoder, with emulated and interpreted kernels, against the plain torch one."""

from dataclasses import replace

import pytest
import torch
from emulated import emulated_operators
from interpreted import interpreted_kernels

interpreted_kernels("methods.lrqk.triton_attend")
from host_attention import use_host_attention  # noqa: E402
from launches import launches  # noqa: E402
from served_layers import ServedLayers, serve  # noqa: E402

from vllm_lrqk.core.step import build_step  # noqa: E402
from vllm_lrqk.devices import cuda_prefill  # noqa: E402
from vllm_lrqk.methods.lrqk.cuda_decode import requests_at_once  # noqa: E402
from vllm_lrqk.methods.lrqk.settings import LRQKSettings  # noqa: E402

SPARSE = LRQKSettings(rank=4, page_size=16, top_k=12, recent_tokens=3, sink_tokens=2)
COVERING = LRQKSettings(rank=4, page_size=16, top_k=80, recent_tokens=3, sink_tokens=2)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def prefill_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    use_host_attention(monkeypatch)


def test_covering_selection() -> None:
    """Everything is attended exactly: float32 sums in another order are all that differs."""
    serve(ServedLayers(emulated_operators(), COVERING, CPU), 1e-5)


@pytest.mark.parametrize("residual", ["linear", "mean"])
def test_sparse_selection(residual: str) -> None:
    """One of 12 rows may change places with one of nearly equal weight, which both leave to the residual."""
    layers = ServedLayers(emulated_operators(), replace(SPARSE, residual=residual), CPU, at_once=2)
    serve(layers, 0.1)
    hits, misses = layers.hot.counters.tolist()
    assert hits > 0
    assert misses > 0


def test_a_page_is_sealed_before_the_next_step() -> None:
    layers = ServedLayers(emulated_operators(), COVERING, CPU)
    request = layers.admit()
    layers.run([(request, 15)])
    layers.run([(request, 1)])
    page = request.pages[0]
    assert not layers.layer.factors.raw[page].any()
    assert layers.layer.counters.pages_sealed == 0
    layers.prepare([(request, 1)])
    torch.testing.assert_close(
        layers.layer.factors.projection_scale[page], layers.expected.factors.projection_scale[page]
    )
    assert layers.layer.counters.pages_sealed == layers.expected.counters.pages_sealed == 1


def test_warm_up_touches_nothing() -> None:
    layers = ServedLayers(emulated_operators(), SPARSE, CPU)
    before = layers.hot.raw.clone(), layers.layer.factors.raw.clone(), layers.layer.host.clone()
    layers.layer.warm_up()
    assert torch.equal(layers.hot.raw, before[0])
    assert torch.equal(layers.layer.factors.raw, before[1])
    assert torch.equal(layers.layer.host.isnan(), before[2].isnan())
    assert layers.hot.counters.tolist() == [0, 0]


def test_pages_without_host_memory_are_left_alone() -> None:
    """vLLM's warm-up hands out block ids of its own: rows of such pages are neither stored nor fetched nor sealed."""
    layers = ServedLayers(emulated_operators(), SPARSE, CPU)
    host, generation = layers.layer.host, layers.hot.generation
    layers.layer.host = layers.layer.decoder.host = host[:3]
    layers.hot.generation = generation[:3]
    host[3:] = torch.arange(3, len(host)).view(-1, 1, 1, 1, 1)
    beyond = host[3:].clone()
    request = layers.admit()
    request.pages, layers.free_pages = [], [2, 6, 5]
    layers.run([(request, 16)])
    layers.run([(request, 16)])
    layers.run([(request, 1)])
    assert request.pages == [5, 6, 2]
    assert torch.equal(host[3:], beyond)
    assert generation.nonzero().flatten().tolist() == [2]
    assert host[2, :, 0].isfinite().all()
    assert layers.hot.counters.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_short_prompts_attend_together(dtype: torch.dtype) -> None:
    """Neighbours without history in one call; a chunk with a history between them does not belong to it."""
    layers = ServedLayers(emulated_operators(), COVERING, CPU, dtype=dtype)
    most = 1e-5 if dtype == torch.float32 else 0.02  # bfloat16: two roundings of 2^-8
    a, b, c, d = (layers.admit() for _ in range(4))
    assert layers.run([(a, 5), (b, 16), (c, 3), (d, 18)]) < most
    assert layers.layer.counters.pages_sealed == layers.expected.counters.pages_sealed == 2
    for request in (a, c, d):
        layers.release(request)
    e, f, g = (layers.admit() for _ in range(3))
    step = layers.prepare([(e, 4), (b, 9), (f, 20), (g, 2)])
    assert [len(run.chunks) for run in step.prompt_runs] == [1, 1, 2]
    layers.replay(step)
    assert layers.error() < most
    assert layers.run([(e, 1), (b, 1), (f, 1), (g, 1)]) < max(most, 1e-5)


def test_launches_do_not_grow_with_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, calls = ServedLayers(emulated_operators(), COVERING, CPU, dtype=torch.bfloat16), []

    def attention(query: torch.Tensor, *rest: object) -> torch.Tensor:
        calls.append(len(query))
        return query

    monkeypatch.setattr(cuda_prefill, "default_prompt_attention", lambda: attention)
    totals = []
    for count in (2, 4):
        step = layers.prepare([(layers.admit(), 3) for _ in range(count)])
        with launches() as counts:
            layers.replay(step)
        totals.append(counts)
        layers.free_hot_blocks = list(range(14, 14 + 4 * layers.hot_blocks_per_request))
    assert totals[0] == totals[1]
    assert calls == [6, 12]


class TestBuildStep:
    TABLE = torch.arange(20).view(4, 5).int()
    SLOTS = torch.arange(64)

    def build(self, counts: list[int], lens: list[int], *drafts):  # type: ignore[no-untyped-def]
        starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
        return build_step(starts, lens, self.TABLE, torch.tensor(lens).int(), self.SLOTS, 16, *drafts)

    def test_single_tokens_decode(self) -> None:
        step = self.build([1, 1, 3, 20], [32, 7, 3, 40])
        assert (step.num_tokens, step.num_decodes) == (25, 2)
        assert [(c.start, c.end, c.context_len) for c in step.prefill] == [(2, 5, 0), (5, 25, 20)]
        assert [c.filled for c in step.prefill] == [range(0), range(1, 2)]
        assert step.filled == [(0, 1)]

    def test_padding_is_no_request(self) -> None:
        step = self.build([1, 1, 0, 0], [16, 17, 0, 0])
        assert (step.num_tokens, step.num_decodes, step.prefill, step.filled) == (2, 2, [], [(0, 0)])

    def test_a_single_token_behind_a_chunk_is_exact(self) -> None:
        step = self.build([2, 1], [2, 1])
        assert (step.num_decodes, len(step.prefill)) == (0, 2)

    def test_drafted_tokens_decode_and_short_chunks_do_not(self) -> None:
        step = self.build([3, 2, 1, 4], [34, 32, 7, 40], 3, [False, True, True, False])
        assert [(c.request, c.start, c.end) for c in step.prefill] == [(1, 3, 5), (3, 6, 10)]
        assert (step.num_decodes, step.filled, step.passed) == (4, [], [(0, 1)])
        (together,) = step.decoding(one_per_request=False)
        assert together.tokens.tolist() == [0, 1, 2, 5]
        assert together.seq_lens.tolist() == [32, 33, 34, 7]
        assert together.block_table.equal(self.TABLE[[0, 0, 0, 2]])
        turns = step.decoding(one_per_request=True)
        assert [turn.requests.tolist() for turn in turns] == [[0, 2], [0], [0]]
        assert [turn.seq_lens.tolist() for turn in turns] == [[32, 7], [33], [34]]

    def test_a_page_that_a_span_ends_with_is_sealed_before_the_next_step(self) -> None:
        step = self.build([3], [48], 3, [False])
        assert (step.filled, step.passed) == ([(0, 2)], [])

    def test_tensors_are_those_of_the_batch(self) -> None:
        """A captured graph reads the memory that vLLM fills before each replay."""
        lens = torch.tensor([5, 6]).int()
        step = build_step([0, 1, 2], [5, 6], self.TABLE, lens, self.SLOTS, 16)
        pointers = (step.block_table.data_ptr(), step.seq_lens.data_ptr(), step.slot_mapping.data_ptr())
        assert pointers == (self.TABLE.data_ptr(), lens.data_ptr(), self.SLOTS.data_ptr())


@pytest.mark.parametrize(("budget", "expected"), [(1, 1), (1 << 40, 50)])
def test_memory_of_steps_is_bounded(budget: int, expected: int) -> None:
    config = LRQKSettings()
    assert requests_at_once(emulated_operators(), 50, 512, 32, 8, 3000, config, budget) == expected


def test_requests_at_once_keep_the_block_table_aligned() -> None:
    """At 128K with 32 heads a request takes 12 to 16 MiB, nearly all of it scores and weights."""
    count = requests_at_once(emulated_operators(), 256, 512, 32, 8, 3000, LRQKSettings())
    assert 32 <= count <= 42
    assert count % 4 == 0


def test_memory_of_steps_is_float32_whatever_the_default() -> None:
    """vLLM loads a model with its type as torch's default, and the memory is taken meanwhile."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        layers = ServedLayers(emulated_operators(), SPARSE, CPU, dtype=torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)
    a, b = layers.admit(), layers.admit()
    layers.run([(a, 21), (b, 15)])
    for _ in range(3):
        assert layers.run([(a, 1), (b, 1)]) < 0.1  # of one of 12 rows, and bfloat16
