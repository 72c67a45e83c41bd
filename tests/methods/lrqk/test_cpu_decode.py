"""The compiled decode and selection kernels against their plain torch forms."""

import pytest
import torch
from cpu_kernel_cases import DTYPES, INSTRUCTION_SETS, Layer, make_layer, relative_error

from vllm_lrqk.core.logits import PLAIN, Logits
from vllm_lrqk.core.selection import candidate_range
from vllm_lrqk.methods.lrqk.dispatch import force_kernels, host_kernels
from vllm_lrqk.methods.lrqk.score import proxy_scores
from vllm_lrqk.methods.lrqk.settings import LRQKSettings
from vllm_lrqk.methods.lrqk.torch_ops import kernels as torch_kernels

pytestmark = pytest.mark.skipif(not INSTRUCTION_SETS, reason="CPU kernels are not built")

# The output is rounded to its dtype: half a unit in the last place, twice where two roundings differ.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# Projected queries are quantised to 16 bits, which moves a score by up to rank * 127 / 2 steps of 1 / 32767 of the
# largest product: below 4e-3 for these scores (below 30), 1e-4 typically. Weights are kept as bfloat16, which is
# another 2e-3 at most.
SCORE_ERROR = 6e-3
# That error on the residual's share of the output, and rows of nearly equal weight that change places with it.
RESIDUAL_ERROR = 1e-3


def run_decode(name: str, layer: Layer, logits: Logits = PLAIN) -> tuple[torch.Tensor, torch.Tensor]:
    output = torch.full_like(layer.query, torch.nan)
    with force_kernels(name) as kernels:
        attended = kernels.decode_attention(*layer.decode_arguments(), output, logits)
    return output, attended


def check_decode(name: str, layer: Layer, logits: Logits = PLAIN) -> None:
    expected, expected_rows = run_decode("torch", layer, logits)
    output, attended = run_decode(name, layer, logits)
    assert torch.equal(attended, expected_rows)
    assert not output.isnan().any()
    assert relative_error(output, expected) < ROUNDING[layer.query.dtype] + RESIDUAL_ERROR


def check_selection(name: str, layer: Layer) -> None:
    """Sets may differ where weights differ by less than the scores' error: compare weights with the threshold."""
    config, n = layer.config, layer.config.page_size
    expected = torch_kernels().select(*layer.select_arguments())
    with force_kernels(name) as kernels:
        actual = kernels.select(*layer.select_arguments())
    assert actual.positions.shape == expected.positions.shape
    assert (actual.residual is None) == (expected.residual is None)
    first, ends = candidate_range(layer.seq_lens, config)
    kv_heads = layer.host.shape[1]
    for b, end in enumerate(ends.tolist()):
        num_pages = -(-end // n)
        for h in range(kv_heads):
            rows, truth = (sorted(x.positions[b, h][x.positions[b, h] >= 0].tolist()) for x in (actual, expected))
            assert len(rows) == len(set(rows)) == len(truth)
            if rows == truth:
                continue
            table = layer.block_table[b : b + 1, :num_pages]
            scores = proxy_scores(layer.query[b : b + 1], layer.factors, table, layer.scale).flatten(2)[0]
            weight = scores[:, first:end].double().softmax(-1).unflatten(0, (kv_heads, -1))[h].sum(0)
            threshold = weight.topk(config.top_k).values[-1]
            only = torch.tensor(sorted(set(rows) ^ set(truth))) - first
            assert ((weight[only] / threshold).log().abs() < 2 * SCORE_ERROR).all()
    if expected.residual is None or actual.residual is None:
        return
    same_rows = all(
        torch.equal(a.sort().values, e.sort().values)
        for a, e in zip(actual.positions.flatten(0, 1), expected.positions.flatten(0, 1))
    )
    assert torch.equal(actual.residual.isinf(), expected.residual.isinf()) or not same_rows
    finite = ~expected.residual.isinf() & ~actual.residual.isinf()
    if same_rows and finite.any():
        assert (actual.residual - expected.residual)[finite].abs().max() < SCORE_ERROR
        if actual.moment is not None and expected.moment is not None:
            # A mean of stored elements whose weights are off by the scores' error and by bfloat16's rounding (2^-9).
            difference = (actual.moment - expected.moment)[finite].abs().max()
            assert (
                difference
                < (SCORE_ERROR + 2**-8)
                * layer.factors.key_factor_words[layer.block_table.unique().long()].float().nan_to_num(0).abs().max()
            )


def test_torch_chooses_the_oldest_of_equal_weights() -> None:
    for top_k in (1, 77, 600):
        layer = make_layer([1000], LRQKSettings(page_size=32, top_k=top_k))
        layer.query.zero_()
        expected = [*range(4 + top_k), *range(1000 - 64, 1000)]
        for head in torch_kernels().select(*layer.select_arguments()).positions[0]:
            assert head[head >= 0].sort().values.tolist() == expected


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
class TestAgainstTorch:
    @pytest.mark.parametrize("length", [1, 2, 31, 63, 64, 65, 160, 161, 171, 172, 173, 500, 1000, 2047])
    def test_lengths(self, name: str, length: int) -> None:
        """top_k is 100: 172 tokens (64 recent, 4 sink, 8 in the unsealed page or recent) are just all selected."""
        layer = make_layer([length], LRQKSettings(page_size=32, top_k=100))
        check_decode(name, layer)
        check_selection(name, layer)

    @pytest.mark.parametrize("top_k", [1, 15, 16, 17, 435, 436, 437, 5000])
    def test_top_k(self, name: str, top_k: int) -> None:
        """500 tokens have 436 - 4 candidates."""
        layer = make_layer([500], LRQKSettings(page_size=16, top_k=top_k))
        check_decode(name, layer)
        check_selection(name, layer)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("factor_dtype", ["int8", "bfloat16"])
    @pytest.mark.parametrize("residual", ["linear", "mean", "none"])
    def test_ragged_batch(self, name: str, dtype: torch.dtype, factor_dtype: str, residual: str) -> None:
        config = LRQKSettings(page_size=64, top_k=128, factor_dtype=factor_dtype, residual=residual)
        layer = make_layer([1, 700, 63, 64, 2000, 260, 129], config, dtype)
        check_decode(name, layer)
        check_selection(name, layer)

    @pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256, 512])
    @pytest.mark.parametrize("residual", ["linear", "mean"])
    def test_page_size(self, name: str, page_size: int, residual: str) -> None:
        config = LRQKSettings(page_size=page_size, top_k=200, residual=residual)
        layer = make_layer([1500, 333], config, torch.bfloat16)
        check_decode(name, layer)
        check_selection(name, layer)

    @pytest.mark.parametrize("rank", [4, 8, 12, 16, 20, 32])
    @pytest.mark.parametrize("factor_dtype", ["int8", "bfloat16"])
    @pytest.mark.parametrize("residual", ["linear", "mean"])
    def test_rank(self, name: str, rank: int, factor_dtype: str, residual: str) -> None:
        config = LRQKSettings(page_size=64, top_k=100, rank=rank, factor_dtype=factor_dtype, residual=residual)
        layer = make_layer([900, 400], config)
        check_decode(name, layer)
        check_selection(name, layer)

    @pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128, 256])
    @pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
    def test_heads(self, name: str, head_size: int, group: int) -> None:
        config = LRQKSettings(page_size=32, top_k=100, residual="linear")
        layer = make_layer([600], config, torch.bfloat16, head_size=head_size, group=group)
        check_decode(name, layer)
        check_selection(name, layer)

    @pytest.mark.parametrize("sink_tokens", [0, 1, 16, 40])
    @pytest.mark.parametrize("recent_tokens", [1, 17, 64])
    def test_sink_and_recent(self, name: str, sink_tokens: int, recent_tokens: int) -> None:
        config = LRQKSettings(page_size=16, top_k=50, sink_tokens=sink_tokens, recent_tokens=recent_tokens)
        layer = make_layer([300, 32, 5, 41], config)
        check_decode(name, layer)
        check_selection(name, layer)

    def test_selects_by_peaks(self, name: str) -> None:
        """Long enough, compared with top_k, that the threshold comes from peaks of several tokens."""
        layer = make_layer([20000], LRQKSettings(page_size=256, top_k=64))
        check_decode(name, layer)
        check_selection(name, layer)

    def test_strided_arguments(self, name: str) -> None:
        config = LRQKSettings(page_size=32, top_k=64)
        layer = make_layer([500, 300], config)
        expected, _ = run_decode(name, layer)
        batch, heads, d = layer.query.shape
        wide = torch.full((batch, 3 * heads, d), torch.nan)
        wide[:, :heads] = layer.query
        layer.query = wide[:, :heads]
        host = torch.full((len(layer.host), 3, *layer.host.shape[1:]), torch.nan)
        host[:, 1] = layer.host
        layer.host = host[:, 1]
        raw = torch.full((len(host), 3, *layer.factors.raw.shape[1:]), 0xFF, dtype=torch.uint8)
        raw[:, 2] = layer.factors.raw
        layer.factors = type(layer.factors)(raw[:, 2], layer.factors.format)
        layer.block_table, layer.seq_lens = layer.block_table.long(), layer.seq_lens.long()
        output = torch.full_like(wide, torch.nan)
        with force_kernels(name) as kernels:
            kernels.decode_attention(*layer.decode_arguments(), output[:, :heads])
        assert torch.equal(output[:, :heads], expected)
        assert output[:, heads:].isnan().all()

    @pytest.mark.parametrize("residual", ["linear", "mean"])
    def test_needle_page_keeps_its_residual(self, name: str, residual: str) -> None:
        """A page whose selected tokens hold nearly all of its weight: what is left must not drown in rounding."""
        config = LRQKSettings(page_size=16, top_k=1, recent_tokens=1, sink_tokens=0, rank=4, residual=residual)
        layer = make_layer([33], config, kv_heads=1, group=1)
        layer.factors.projection_scale[:] = 1.0
        layer.factors.projection[:] = 0
        layer.factors.projection[:, :, 0, 0] = 1
        layer.factors.key_factor_words[:] = 0
        layer.factors.value_mean[:] = 1.0
        needle = layer.block_table[0, 0]
        layer.factors.key_factor_words[needle, 0, 0, 5, 0] = 40
        layer.query[:] = 0
        layer.query[0, 0, 0] = 8.0  # with a scale of 1/8: scores of 40 and 0
        check_selection(name, layer)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("top_k", "cap"), [(5000, 1.0), (5000, 50.0), (128, 50.0), (5000, 0.0), (128, 0.0)])
    @pytest.mark.parametrize("with_sinks", [False, True])
    def test_caps_and_sinks(self, name: str, dtype: torch.dtype, top_k: int, cap: float, with_sinks: bool) -> None:
        """Where tokens are selected, under a cap that leaves their weights apart."""
        layer = make_layer([1, 700, 63, 2000], LRQKSettings(page_size=64, top_k=top_k), dtype)
        sinks = torch.linspace(-3, 6, layer.query.shape[1]) if with_sinks else None
        check_decode(name, layer, Logits(cap, sinks))

    def test_residual_behind_a_cap(self, name: str) -> None:
        layer = make_layer([2000], LRQKSettings(page_size=64, top_k=1))
        expected = torch_kernels().select(*layer.select_arguments(), Logits(2.0))
        with force_kernels(name) as kernels:
            actual = kernels.select(*layer.select_arguments(), Logits(2.0))
        # One token more or less of a page of 64, whose weights lie within e^4 of each other: SCORE_ERROR and its share.
        assert (actual.residual - expected.residual).abs().median() < SCORE_ERROR
        plain = torch_kernels().select(*layer.select_arguments())
        assert (plain.residual - expected.residual).abs().median() > 10 * SCORE_ERROR

    @pytest.mark.parametrize("top_k", [1, 77, 600])
    def test_of_equal_weights_the_oldest_are_chosen(self, name: str, top_k: int) -> None:
        """Weights are rounded relative to what was seen before a page, so they are equal within pages only."""
        layer = make_layer([1000], LRQKSettings(page_size=32, top_k=top_k))
        layer.query.zero_()
        with force_kernels(name) as kernels:
            rows = kernels.select(*layer.select_arguments()).positions[0]
        for head in rows:
            chosen = sorted(p for p in head.tolist() if 4 <= p < 1000 - 64)
            assert len(chosen) == top_k
            for page in {p // 32 for p in chosen}:
                here = [p for p in chosen if p // 32 == page]
                assert here == list(range(here[0], here[0] + len(here))) and here[0] in (page * 32, 4)

    def test_threads_do_not_change_the_result(self, name: str) -> None:
        layer = make_layer([5000], LRQKSettings(page_size=256, top_k=600), torch.bfloat16, kv_heads=1)
        config = LRQKSettings(page_size=64, top_k=600, residual="linear")
        layers = [layer, make_layer([3000, 10, 900], config, torch.float32)]
        threads = torch.get_num_threads()
        try:
            for case in layers:
                results = []
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    results.append(run_decode(name, case)[0])
                assert torch.equal(results[0], results[1])
                assert torch.equal(results[0], results[2])
        finally:
            torch.set_num_threads(threads)


def test_best_instruction_set_is_the_default() -> None:
    assert host_kernels().name == f"cpu-{INSTRUCTION_SETS[0]}"


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot run here"), force_kernels("sse9"):
        pass
