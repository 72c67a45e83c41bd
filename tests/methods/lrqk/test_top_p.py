"""The adaptive budget: of the top_k tokens only as many as carry the share top_p of the candidates' proxy weight."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from cpu_kernel_cases import DTYPES, INSTRUCTION_SETS, Layer, make_layer

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.counters import Counters
from vllm_lrqk.core.selection import Selection, candidate_range, heaviest
from vllm_lrqk.core.step import build_step
from vllm_lrqk.methods.lrqk.cpu_decoders import TALLIES, InPlaceDecoder
from vllm_lrqk.methods.lrqk.cuda_select import check_config
from vllm_lrqk.methods.lrqk.dispatch import force_kernels, host_kernels
from vllm_lrqk.methods.lrqk.layer import LRQKLayer
from vllm_lrqk.methods.lrqk.score import proxy_scores, select
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

SHARES = [1e-6, 0.3, 0.9, 0.999, 0.9999999]
# Relative error of a weight. Torch: float32 scores below 30. Compiled: the scores' own error, which
# tests/methods/lrqk/test_cpu_decode.py derives, on numerator and denominator of the softmax.
WEIGHT_ERROR = {"torch": 1e-4, **dict.fromkeys(INSTRUCTION_SETS, 1.2e-2)}


def run(name: str, layer: Layer) -> Selection:
    with force_kernels(name) as kernels:
        return kernels.select(*layer.select_arguments())


def candidate_weights(layer: Layer, b: int, kv_head: int) -> dict[int, float]:
    """Summed softmax weight of each candidate, in float64, token by token."""
    config, kv_heads = layer.config, layer.host.shape[1]
    first, end = candidate_range(layer.seq_lens[b : b + 1], config)
    if int(end) <= first:
        return {}
    table = layer.block_table[b : b + 1, : -(-int(end) // config.page_size)]
    scores = proxy_scores(layer.query[b : b + 1], layer.factors, table, layer.scale).flatten(2)[0]
    weight = scores[:, first : int(end)].double().softmax(-1).unflatten(0, (kv_heads, -1))[kv_head].sum(0)
    return dict(zip(range(first, int(end)), weight.tolist()))


def check(name: str, layer: Layer) -> list[int]:
    """Rows against the definition, up to the error of the weights; returns how many candidates were kept."""
    config, kv_heads = layer.config, layer.host.shape[1]
    selection, error = run(name, layer), WEIGHT_ERROR[name]
    group = layer.query.shape[1] // kv_heads
    counts = []
    for b, length in enumerate(layer.seq_lens.tolist()):
        for kv_head in range(kv_heads):
            rows = [row for row in selection.positions[b, kv_head].tolist() if row >= 0]
            assert len(rows) == len(set(rows))
            weight = candidate_weights(layer, b, kv_head)
            always = set(range(length)) - set(weight)
            assert always <= set(rows)
            kept = set(rows) - always
            counts.append(len(kept))
            if not weight:
                continue
            left = set(weight) - kept
            lightest, target = min(weight[n] for n in kept), config.top_p * group
            assert lightest >= max((weight[n] for n in left), default=0.0) * (1 - 2 * error)
            assert 1 <= len(kept) <= config.top_k
            mass = sum(weight[n] for n in kept)
            assert mass - lightest < target * (1 + error)
            assert mass >= target * (1 - error) or len(kept) == min(config.top_k, len(weight))
            check_residual(selection, layer, b, kv_head, left)
    return counts


def check_residual(selection: Selection, layer: Layer, b: int, kv_head: int, left: set[int]) -> None:
    """The residual is finite exactly in the pages with unselected candidates."""
    if layer.config.residual == "none":
        assert selection.residual is None
        return
    assert selection.residual is not None
    group = layer.query.shape[1] // layer.host.shape[1]
    pages = sorted({n // layer.config.page_size for n in left})
    for head in range(kv_head * group, (kv_head + 1) * group):
        assert selection.residual[b, head].isfinite().nonzero()[:, 0].tolist() == pages


NAMES = ["torch", *INSTRUCTION_SETS]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("top_p", SHARES)
class TestAgainstTheDefinition:
    def test_lengths(self, name: str, top_p: float) -> None:
        config = LRQKSettings(page_size=32, top_k=100, top_p=top_p)
        check(name, make_layer([1, 63, 64, 65, 171, 172, 173, 500, 1000], config))

    @pytest.mark.parametrize("top_k", [1, 16, 432, 5000])
    def test_top_k(self, name: str, top_p: float, top_k: int) -> None:
        """500 tokens have 432 candidates; where there are no more than top_k the share counts all the same."""
        check(name, make_layer([500], LRQKSettings(page_size=16, top_k=top_k, top_p=top_p)))

    def test_no_residual(self, name: str, top_p: float) -> None:
        check(name, make_layer([300, 32], LRQKSettings(page_size=16, top_k=50, top_p=top_p, residual="none")))


@pytest.mark.parametrize("name", NAMES)
class TestShapes:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("factor_dtype", ["int8", "bfloat16"])
    def test_dtypes(self, name: str, dtype: torch.dtype, factor_dtype: str) -> None:
        config = LRQKSettings(page_size=64, top_k=128, top_p=0.8, factor_dtype=factor_dtype)
        check(name, make_layer([700, 64, 260], config, dtype))

    @pytest.mark.parametrize(("head_size", "group"), [(32, 1), (64, 3), (96, 7), (128, 8)])
    def test_heads(self, name: str, head_size: int, group: int) -> None:
        config = LRQKSettings(page_size=32, top_k=100, top_p=0.7)
        check(name, make_layer([600], config, torch.bfloat16, head_size=head_size, group=group))

    @pytest.mark.parametrize("page_size", [16, 128, 256])
    def test_page_size(self, name: str, page_size: int) -> None:
        check(name, make_layer([2500, 333], LRQKSettings(page_size=page_size, top_k=300, top_p=0.9)))

    def test_equal_weights_keep_the_first(self, name: str) -> None:
        """300 tokens have 232 candidates of equal weight, all in one page: a sixteenth of it are the 15 first ones."""
        layer = make_layer([300], LRQKSettings(page_size=256, top_k=100, top_p=0.0625))
        layer.query.zero_()
        for rows in run(name, layer).positions[0]:
            assert sorted(rows[(rows >= 4) & (rows < 236)].tolist()) == list(range(4, 19))

    def test_a_larger_share_keeps_more(self, name: str) -> None:
        layer = make_layer([900], LRQKSettings(page_size=32, top_k=800))
        counts = []
        for top_p in SHARES:
            layer.config = replace(layer.config, top_p=top_p)
            counts.append(sum(check(name, layer)))
        assert counts[0] == layer.host.shape[1]
        assert all(low < high for low, high in pairwise(counts))


@pytest.mark.skipif(not INSTRUCTION_SETS, reason="CPU kernels are not built")
@pytest.mark.parametrize("lengths", [[5000], [20000], [3000, 10, 900]], ids=str)
def test_compiled_decode_attends_what_it_selects(lengths: list[int]) -> None:
    """Split over threads or not: rows attended fall, and the output is that of the torch form on those rows.

    Tolerance: 1e-3 relative is the residual's error, see tests/methods/lrqk/test_cpu_decode.py; rows of nearly equal
    weight at the end of the share may differ and move between the exact part and the residual: another 4e-3.
    """
    layer = make_layer(lengths, LRQKSettings(page_size=256, top_k=600, top_p=0.5), kv_heads=2)
    threads = torch.get_num_threads()
    outputs = {}
    try:
        for name, count in (("torch", 1), *((name, n) for name in INSTRUCTION_SETS for n in (1, 3))):
            torch.set_num_threads(count)
            outputs[name, count] = torch.full_like(layer.query, torch.nan)
            with force_kernels(name) as kernels:
                attended = kernels.decode_attention(*layer.decode_arguments(), outputs[name, count])
            selected = (run(name, layer).positions >= 0).sum((1, 2))
            assert attended.tolist() == selected.tolist()
    finally:
        torch.set_num_threads(threads)
    expected = outputs["torch", 1]
    for name in INSTRUCTION_SETS:
        assert torch.equal(outputs[name, 1], outputs[name, 3])
        assert float((outputs[name, 1] - expected).norm() / expected.norm()) < 5e-3
    whole = replace(layer, config=replace(layer.config, top_p=1.0))
    assert int(attended.sum()) < int((select(*whole.select_arguments()).positions >= 0).sum())


def count_rows(layer: Layer) -> int:
    """Rows that the counters of a layer in service say were attended in one decode step."""
    counters, kernels = Counters(TALLIES, 1, layer.host.device), host_kernels()
    decoder = InPlaceDecoder(layer.factors, layer.host, kernels, layer.scale, layer.config, counters.tallies[0])
    state = LRQKLayer(layer.factors, layer.host, decoder, kernels, layer.scale, layer.config, counters)
    last = layer.seq_lens.long() - 1
    page = layer.block_table.long().gather(1, (last // layer.config.page_size)[:, None])[:, 0]
    offset = last % layer.config.page_size
    step = build_step(
        list(range(len(last) + 1)),
        layer.seq_lens.tolist(),
        layer.block_table,
        layer.seq_lens,
        page * layer.config.page_size + offset,
        layer.config.page_size,
    )
    rows = layer.host[page, :, offset]  # [B, KV, 2, d]
    state.forward(layer.query, rows[:, :, 0], rows[:, :, 1], step, None, torch.empty_like(layer.query))
    return counters.wait()["rows_read_in_place"]


def test_counted_rows_fall() -> None:
    layer = make_layer([3000, 900], LRQKSettings(page_size=256, top_k=600))
    counted = []
    for top_p in (1.0, 0.9, 0.3):
        layer.config = replace(layer.config, top_p=top_p)
        counted.append(count_rows(layer))
        selection = host_kernels().select(*layer.select_arguments())
        assert counted[-1] == int((selection.positions >= 0).sum())
    assert counted[0] > counted[1] > counted[2]


def test_by_hand() -> None:
    """Weights of two heads that sum to 2; -1 is no candidate."""
    weight = torch.tensor([[[-1.0, 0.25, 0.5, 0.25, 1.0, 0.0]]])
    kept = {}
    for top_p in (0.4, 0.5, 0.51, 0.75, 0.8, 0.9, 1.0):
        tokens, is_selected = heaviest(weight, 2, LRQKSettings(top_k=4, top_p=top_p))
        kept[top_p] = sorted(tokens[is_selected].tolist())
    assert kept == {
        0.4: [4],
        0.5: [4],
        0.51: [2, 4],
        0.75: [2, 4],
        0.8: [1, 2, 4],
        0.9: [1, 2, 3, 4],
        1.0: [1, 2, 3, 4],
    }


def test_cuda_kernels_refuse_it() -> None:
    check_config(LRQKSettings())
    with pytest.raises(ConfigError, match=r"^lrqk\.top_p is 0\.9, but the CUDA kernels .*: set it to 1\.$"):
        check_config(LRQKSettings(top_p=0.9))
