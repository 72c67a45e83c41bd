"""The compiled kernels of calibrated factors against their plain torch forms."""

from dataclasses import replace

import pytest
import torch
from cpu_kernel_cases import DTYPES, INSTRUCTION_SETS, Layer, make_layer, relative_error

from vllm_lrqk.core.rotary import RotaryTable
from vllm_lrqk.methods.lrqk.calibrated_basis import CalibratedBasis
from vllm_lrqk.methods.lrqk.calibrated_format import CalibratedFormat, CalibratedPages
from vllm_lrqk.methods.lrqk.calibrated_seal import seal_pages
from vllm_lrqk.methods.lrqk.dispatch import force_kernels
from vllm_lrqk.methods.lrqk.settings import LRQKSettings
from vllm_lrqk.methods.lrqk.torch_ops import kernels as torch_kernels

pytestmark = pytest.mark.skipif(not INSTRUCTION_SETS, reason="CPU kernels are not built")

# The query is rounded to 8 bits for each page: a score is off by up to r / 2 steps of a 127th of its largest term, 4e-2
# for these scores (below 10) and a tenth of that typically.
SCORE_ERROR = 4e-2
# That error on the residual's share of the output, and weights and deviations in 8 bits; 1e-4 typically in float32.
OUTPUT_ERROR = {torch.float32: 2e-3, torch.bfloat16: 6e-3, torch.float16: 2e-3}


def calibrated_layer(
    lengths: list[int],
    dtype: torch.dtype = torch.float32,
    head_size: int = 64,
    group: int = 4,
    rotary_dim: int | None = None,
    is_neox_style: bool = True,
    **values,
) -> Layer:
    """Requests of `lengths` tokens, sealed by the plain torch form in a random basis."""
    config = LRQKSettings(**{"page_size": 64, "top_k": 100, "factorization": "calibrated"} | values)
    unsealed = replace(config, factorization="key_pca", rank=4)
    layer = make_layer(lengths, unsealed, dtype, head_size=head_size, group=group)
    kv_heads = layer.host.shape[1]
    generator = torch.Generator().manual_seed(head_size)
    basis = torch.linalg.qr(torch.randn(kv_heads, head_size, 2 * config.rank, generator=generator)).Q
    value = torch.randn(kv_heads, 2 * config.rank, head_size, generator=generator) * 0.3
    table = RotaryTable.from_base(1e4, rotary_dim or head_size, max(lengths) + config.page_size)
    frames = replace(table, is_neox_style=is_neox_style).every(config.page_size)
    form = CalibratedFormat.from_config(config, head_size)
    raw = torch.full((*layer.host.shape[:2], form.page_bytes), 0xFF, dtype=torch.uint8)
    layer.factors = CalibratedPages(raw, form, CalibratedBasis(basis, basis, value, frames))
    layer.config = config
    for pages, numbers in sealed_pages(layer, lengths):
        seal_pages(pages, numbers, layer.host, layer.factors)
    return layer


def sealed_pages(layer, lengths):
    for row, length in enumerate(lengths):
        numbers = torch.arange(length // layer.config.page_size)
        if len(numbers):
            yield layer.block_table[row, numbers].long(), numbers


def decode(name, layer):
    output = torch.full_like(layer.query, torch.nan)
    with force_kernels(name) as kernels:
        return output, kernels.decode_attention(*layer.decode_arguments(), output)


def check_decode(name, layer, error=0.0):
    expected, expected_rows = decode("torch", layer)
    output, rows = decode(name, layer)
    assert torch.equal(rows, expected_rows)
    assert not output.isnan().any()
    same = same_rows(*selections(name, layer)).repeat_interleave(output.shape[1] // layer.host.shape[1], 1)
    assert same.float().mean() >= 0.5 or same.numel() < 10
    assert relative_error(output[same], expected[same]) < max(error, OUTPUT_ERROR[layer.query.dtype])


def selections(name, layer):
    with force_kernels(name) as kernels:
        return kernels.select(*layer.select_arguments()), torch_kernels().select(*layer.select_arguments())


def same_rows(found, expected):
    """Whether both select the same rows, of each request and KV head; few rows may differ, near the threshold."""
    batch, kv_heads = found.positions.shape[:2]
    same = torch.zeros(batch, kv_heads, dtype=torch.bool)
    for b in range(batch):
        for h in range(kv_heads):
            ours, theirs = ({*x.positions[b, h].tolist()} - {-1} for x in (found, expected))
            assert len(ours) == len(theirs)
            same[b, h] = ours == theirs
            assert len(ours - theirs) <= max(1, 0.02 * len(ours))
    return same


def check_selection(name, layer):
    found, expected = selections(name, layer)
    same = same_rows(found, expected)
    if expected.residual is None:
        assert found.residual is None
        return
    group = found.residual.shape[1] // same.shape[1]
    comparable = same.repeat_interleave(group, 1)[..., None] & ~expected.residual.isinf()
    assert not found.residual[comparable].isinf().any()
    assert ((found.residual - expected.residual)[comparable].abs() < 2 * SCORE_ERROR).all()
    if expected.moment is not None:
        highest = torch.full((layer.factors.format.rank,), 7.0)
        highest[: layer.factors.format.leading_rank] = 127.0
        assert ((found.moment - expected.moment)[comparable].abs() / highest < 0.05).all()


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
class TestAgainstTorch:
    @pytest.mark.parametrize("length", [1, 63, 64, 65, 172, 300, 500, 1000, 2047])
    def test_lengths(self, name, length):
        layer = calibrated_layer([length])
        check_decode(name, layer)
        check_selection(name, layer)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("value_map", ["page", "calibrated"])
    @pytest.mark.parametrize("residual", ["linear", "mean", "none"])
    def test_ragged_batch(self, name, dtype, value_map, residual):
        layer = calibrated_layer([1, 700, 63, 64, 2000, 260, 129], dtype, value_map=value_map, residual=residual)
        check_decode(name, layer)
        check_selection(name, layer)

    @pytest.mark.parametrize(
        ("head_size", "rank"), [(32, 8), (32, 16), (64, 24), (96, 16), (128, 16), (128, 8), (256, 32)]
    )
    @pytest.mark.parametrize("group", [1, 3, 4, 7])
    def test_heads_and_columns(self, name, head_size, rank, group):
        check_decode(name, calibrated_layer([600], head_size=head_size, group=group, rank=rank))

    @pytest.mark.parametrize("page_size", [16, 32, 128, 256, 1024])
    def test_page_size(self, name, page_size):
        check_decode(name, calibrated_layer([2500, 333], page_size=page_size))

    @pytest.mark.parametrize(("rotary_dim", "is_neox_style"), [(64, False), (32, True), (32, False)])
    def test_forms_of_rope(self, name, rotary_dim, is_neox_style):
        layer = calibrated_layer([700], rotary_dim=rotary_dim, is_neox_style=is_neox_style)
        check_decode(name, layer)
        check_selection(name, layer)

    def test_many_pages(self, name):
        """Several tiles of pages that are projected together, and parts of an item."""
        check_decode(name, calibrated_layer([20000], page_size=256, top_k=64))

    @pytest.mark.parametrize("value_map", ["page", "calibrated"])
    def test_what_is_left_of_a_page_beside_a_needle(self, name, value_map):
        """All of a page's weight in 8 bits would be that of the token which is selected.

        Errors are larger: the residual is all that three heads of four attend to, and what its query is rounded to
        depends on the needle, whose score is four times that of the others.
        """
        layer = calibrated_layer([65], recent_tokens=1, sink_tokens=0, top_k=1, value_map=value_map)
        page = layer.block_table[0, :1].long()
        needle = layer.query[0, ::4] / layer.query[0, ::4].norm(dim=-1, keepdim=True)
        layer.host[page[0], :, 5, 0] += 30 * needle
        seal_pages(page, torch.tensor([0]), layer.host, layer.factors)
        check_selection(name, layer)
        check_decode(name, layer, 0.04)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("head_size", "rank"), [(32, 8), (64, 16), (128, 16), (96, 24)])
    @pytest.mark.parametrize("value_map", ["page", "calibrated"])
    def test_sealing(self, name, dtype, head_size, rank, value_map):
        layer = calibrated_layer([300, 64], dtype, head_size, rank=rank, value_map=value_map)
        check_sealing(name, layer, [300, 64])

    @pytest.mark.parametrize(("rotary_dim", "is_neox_style"), [(64, False), (32, True), (32, False)])
    def test_sealing_of_forms_of_rope(self, name, rotary_dim, is_neox_style):
        layer = calibrated_layer([300], rotary_dim=rotary_dim, is_neox_style=is_neox_style)
        check_sealing(name, layer, [300])

    def test_a_page_depends_on_its_tokens_alone(self, name):
        """Whatever is sealed with it, and by how many threads, its bytes are the same."""
        layer = calibrated_layer([700])
        threads, found = torch.get_num_threads(), []
        try:
            for count, order in ((1, [list(range(10))]), (2, [[9], [1, 0, 2], list(range(3, 9))])):
                torch.set_num_threads(count)
                layer.factors.raw.fill_(0xFF)
                for numbers in order:
                    pages = layer.block_table[0, numbers].long()
                    with force_kernels(name) as kernels:
                        kernels.seal_calibrated(pages, torch.tensor(numbers), layer.host, layer.factors)
                found.append(layer.factors.raw.clone())
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(*found)

    def test_threads_do_not_change_the_result(self, name):
        layer = calibrated_layer([5000, 10, 900], page_size=128, top_k=300)
        threads, found = torch.get_num_threads(), []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(decode(name, layer)[0])
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def check_sealing(name, layer, lengths):
    """Numbers that lie between two steps may round either way; what they stand for is nearly the same."""
    expected = layer.factors
    layer.factors = CalibratedPages(torch.full_like(expected.raw, 0xFF), expected.format, expected.basis)
    for pages, numbers in sealed_pages(layer, lengths):
        with force_kernels(name) as kernels:
            kernels.seal_calibrated(pages, numbers, layer.host, layer.factors)
        found, truth = layer.factors.key_factor(pages).int(), expected.key_factor(pages).int()
        assert (found - truth).abs().max() <= 1
        assert (found != truth).float().mean() < 2e-3
        for view in ("projection_scale", "value_mean", "key_factor_mean"):
            ours, theirs = (getattr(factors, view)[pages] for factors in (layer.factors, expected))
            torch.testing.assert_close(ours, theirs, rtol=8e-3, atol=0.05)  # a step of bfloat16, or of a factor
        if expected.format.has_value_map:
            found, truth = layer.factors.value_map(pages), expected.value_map(pages)
            step = expected.value_scale[pages].float()[..., None]
            assert ((found - truth).abs() / step).max() < 1.1
            assert relative_error(found, truth) < 0.05
