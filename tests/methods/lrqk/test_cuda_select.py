"""The CUDA selection kernels, emulated, against their plain torch form."""

import pytest
import torch
from cpu_kernel_cases import DTYPES, Layer, make_layer
from emulated import emulated_operators
from selections import HALF, assert_selects_like

from vllm_lrqk.core.selection import Selection, candidate_range
from vllm_lrqk.methods.lrqk.cuda_select import SelectWorkspace
from vllm_lrqk.methods.lrqk.score import select
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

RESIDUALS = ["mean", "linear"]
CPU = torch.device("cpu")


def workspace_for(layer: Layer, requests: int = 0, pages: int = 0) -> SelectWorkspace:
    batch, heads, _ = layer.query.shape
    requests, pages = max(requests, batch), max(pages, layer.block_table.shape[1])
    kv_heads = layer.host.shape[1]
    workspace = SelectWorkspace(emulated_operators(), requests, pages, heads, kv_heads, layer.config, CPU)
    workspace._scratch.fill_(0xFF)
    workspace._positions.fill_(-77)
    workspace._residual.fill_(torch.nan)
    workspace._moment.fill_(torch.nan)
    return workspace


def run(layer: Layer, workspace: SelectWorkspace | None = None) -> Selection:
    return (workspace or workspace_for(layer)).select(*layer.select_arguments()[:-1])


def check(layer: Layer) -> None:
    actual = run(layer)
    config = layer.config
    assert actual.positions.shape[-1] == config.attended_rows
    assert_selects_like(actual, select(*layer.select_arguments()), layer, HALF)


class TestAgainstTorch:
    @pytest.mark.parametrize("residual", RESIDUALS)
    def test_lengths(self, residual: str) -> None:
        config = LRQKSettings(page_size=32, top_k=100, residual=residual)
        check(make_layer([1, 2, 63, 64, 65, 160, 171, 172, 173, 500, 1000], config))

    @pytest.mark.parametrize("residual", RESIDUALS)
    @pytest.mark.parametrize("top_k", [1, 16, 435, 436, 437, 5000])
    def test_top_k(self, top_k: int, residual: str) -> None:
        """500 tokens have 436 - 4 candidates."""
        check(make_layer([500], LRQKSettings(page_size=16, top_k=top_k, residual=residual)))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("factor_dtype", ["int8", "bfloat16"])
    @pytest.mark.parametrize("residual", RESIDUALS)
    def test_dtypes(self, dtype: torch.dtype, factor_dtype: str, residual: str) -> None:
        config = LRQKSettings(page_size=64, top_k=128, factor_dtype=factor_dtype, residual=residual)
        check(make_layer([700, 64, 260], config, dtype))

    @pytest.mark.parametrize("page_size", [16, 64, 128, 256, 1024])
    @pytest.mark.parametrize("residual", RESIDUALS)
    def test_page_size(self, page_size: int, residual: str) -> None:
        check(make_layer([2500, 333], LRQKSettings(page_size=page_size, top_k=200, residual=residual)))

    @pytest.mark.parametrize("rank", [4, 12, 20, 32, 64])
    @pytest.mark.parametrize("factor_dtype", ["int8", "bfloat16"])
    @pytest.mark.parametrize("residual", RESIDUALS)
    def test_rank(self, rank: int, factor_dtype: str, residual: str) -> None:
        config = LRQKSettings(page_size=64, top_k=100, rank=rank, factor_dtype=factor_dtype, residual=residual)
        check(make_layer([400], config))

    @pytest.mark.parametrize(("head_size", "group"), [(64, 1), (96, 2), (128, 4), (256, 7), (128, 8), (64, 12)])
    @pytest.mark.parametrize("factor_dtype", ["int8", "bfloat16"])
    @pytest.mark.parametrize("residual", RESIDUALS)
    def test_heads(self, head_size: int, group: int, factor_dtype: str, residual: str) -> None:
        config = LRQKSettings(page_size=32, top_k=100, factor_dtype=factor_dtype, residual=residual)
        check(make_layer([600], config, head_size=head_size, group=group))

    @pytest.mark.parametrize("group", [1, 2, 3, 12])
    @pytest.mark.parametrize("factor_dtype", ["int8", "bfloat16"])
    def test_highest_rank_of_each_number_of_heads(self, group: int, factor_dtype: str) -> None:
        config = LRQKSettings(page_size=64, top_k=100, rank=60, factor_dtype=factor_dtype, residual="linear")
        check(make_layer([400], config, group=group))

    @pytest.mark.parametrize(("sink_tokens", "recent_tokens"), [(0, 1), (1, 17), (40, 64), (300, 5)])
    @pytest.mark.parametrize("residual", RESIDUALS)
    def test_sink_and_recent(self, sink_tokens: int, recent_tokens: int, residual: str) -> None:
        tokens = {"sink_tokens": sink_tokens, "recent_tokens": recent_tokens}
        config = LRQKSettings(page_size=16, top_k=50, residual=residual, **tokens)
        check(make_layer([300, 32, 5, 41], config))

    def test_no_residual(self) -> None:
        check(make_layer([300, 32], LRQKSettings(page_size=16, top_k=50, residual="none")))

    @pytest.mark.parametrize("residual", RESIDUALS)
    def test_needle_page_keeps_its_residual(self, residual: str) -> None:
        """A page whose selected token holds nearly all of its weight: what is left must not drown in rounding."""
        config = LRQKSettings(page_size=16, top_k=1, recent_tokens=1, sink_tokens=0, rank=4, residual=residual)
        layer = make_layer([33], config, kv_heads=1, group=1)
        layer.factors.projection_scale[:] = 1.0
        layer.factors.projection[:] = 0
        layer.factors.projection[:, :, 0, 0] = 1
        layer.factors.key_factor_words[:] = 0
        layer.factors.key_factor_words[layer.block_table[0, 0], 0, 0, 5, 0] = 40
        layer.query[:] = 0
        layer.query[0, 0, 0] = 8.0  # with a scale of 1/8: scores of 40 and 0
        check(layer)

    @pytest.mark.parametrize("residual", RESIDUALS)
    def test_padding_is_inert(self, residual: str) -> None:
        """A request of length 0, whose block table and query mean nothing."""
        layer = make_layer([300, 16, 500], LRQKSettings(page_size=16, top_k=50, residual=residual))
        expected = select(*layer.select_arguments())
        layer.seq_lens[1], layer.query[1], layer.block_table[1] = 0, torch.nan, 1 << 30
        actual = run(layer)
        assert actual.residual is not None
        assert (actual.positions[1] == -1).all()
        assert (actual.residual[1] == -torch.inf).all()
        layer.block_table[1] = 0
        expected.positions[1], layer.query[1] = -1, 0
        assert expected.residual is not None
        expected.residual[1] = -torch.inf
        if expected.moment is not None:
            expected.moment[1] = 0
        assert_selects_like(actual, expected, layer, HALF)


def test_equal_weights_choose_the_first() -> None:
    """More ties than the list has room for, over several chunks."""
    layer = make_layer([20000], LRQKSettings(page_size=256, top_k=77), kv_heads=1, group=1)
    layer.query.zero_()
    rows = run(layer).positions[0, 0]
    assert rows[:77].tolist() == list(range(4, 81))


def test_ties_before_heavier_tokens() -> None:
    """The last tie that is chosen lies in an earlier chunk than ten tokens that weigh more."""
    config = LRQKSettings(page_size=256, top_k=20)
    layer = make_layer([20000], config, kv_heads=1, group=1)
    layer.factors.projection_scale[:] = 1.0
    layer.factors.projection[:] = 0
    layer.factors.projection[:, :, 0, 0] = 1
    layer.factors.key_factor_words[:] = 0
    page = layer.factors.key_factor_words[layer.block_table[0, 70], 0, 0, :, 0]
    page[:] = -1  # no ties here: rounding against the heavier ones of their tile would break them
    page[100:110] = 4
    layer.query[:] = 0
    layer.query[0, 0, 0] = 8.0
    heavier = range(70 * 256 + 100, 70 * 256 + 110)
    assert run(layer).positions[0, 0, :20].tolist() == [*range(4, 14), *heavier]


def test_rows_are_in_order_over_chunks() -> None:
    layer = make_layer([9000], LRQKSettings(page_size=256, top_k=600))
    selection = run(layer)
    assert_selects_like(selection, select(*layer.select_arguments()), layer, HALF)
    chosen = selection.positions[..., :600]
    assert (chosen.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("residual", RESIDUALS)
def test_memory_is_used_again(residual: str) -> None:
    """Calls of different sizes in one workspace, each of which must leave the state as it found it."""
    config = LRQKSettings(page_size=32, top_k=100, residual=residual)
    layers = [make_layer(lengths, config, seed=i) for i, lengths in enumerate([[700, 40], [300], [64, 1, 999], [700]])]
    workspace = workspace_for(layers[2], requests=4, pages=40)
    for layer in [*layers, *layers]:
        actual = run(layer, workspace)
        assert_selects_like(actual, select(*layer.select_arguments()), layer, HALF)


def test_a_batch_that_does_not_fit_is_refused() -> None:
    layer = make_layer([300], LRQKSettings(page_size=32, top_k=100))
    workspace = workspace_for(layer, requests=2)
    workspace.max_requests = 1
    with pytest.raises(RuntimeError, match="state has room"):
        workspace.select(
            layer.query.repeat(2, 1, 1), layer.factors, layer.block_table.repeat(2, 1), layer.seq_lens.repeat(2), 1.0
        )


def test_moments_of_pages_without_candidates_are_not_written() -> None:
    """A block table is as wide as the longest context may be; what nobody asks for costs no memory traffic."""
    layer = make_layer([100, 500, 20], LRQKSettings(page_size=16, top_k=50, residual="linear"))
    selection = run(layer)
    assert selection.moment is not None
    _, ends = candidate_range(layer.seq_lens, layer.config)
    is_asked = torch.arange(selection.moment.shape[2]) * 16 < ends[:, None]
    assert is_asked.sum(1).tolist() == [3, 28, 0]  # 64 tokens and the open page are recent
    written = ~selection.moment.isnan()
    assert torch.equal(written.all(-1), is_asked[:, None].expand(written.shape[:3]))
    assert torch.equal(written.any(-1), written.all(-1))


@pytest.mark.parametrize("shift", [4, 8])
def test_misaligned_factor_pages_are_refused(shift: int) -> None:
    """Kernels read 16 bytes at once, which a GPU does at multiples of 16 alone."""
    layer = make_layer([300], LRQKSettings(page_size=32, top_k=100))
    raw, workspace = layer.factors.raw, workspace_for(layer)
    memory = torch.zeros(raw.numel() + shift, dtype=torch.uint8)
    layer.factors.raw = memory[shift:].view(raw.shape)
    with pytest.raises(RuntimeError, match="factors must be aligned to 16 bytes"):
        run(layer, workspace)
