"""The compiled kernel that factorises pages against its plain torch form.

Factors are compared by the scores that they give: signs and quantisation steps of single elements may differ, because
float32 solves differ in their last digits and a column's scale follows its largest element.
"""

import pytest
import torch
from cpu_kernel_cases import DTYPES, INSTRUCTION_SETS, relative_error

from vllm_lrqk.methods.lrqk.dispatch import force_kernels
from vllm_lrqk.methods.lrqk.format import FactorPages, PageFormat
from vllm_lrqk.methods.lrqk.score import proxy_scores
from vllm_lrqk.methods.lrqk.seal import seal_pages
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

pytestmark = pytest.mark.skipif(not INSTRUCTION_SETS, reason="CPU kernels are not built")

# Elements that round to the other side move by one of 127 steps; the solves' conditions (1e4 by the ridge) turn
# float32 rounding into about 1e-3.
SCORE_ERROR = 5e-3
# Random values are explained by chance alone: small coefficients that follow every step in which key factors differ.
# Up to 16 columns; more of them are more alike, and larger coefficients that cancel are rounded to int8.
VALUE_ERROR = 5e-2
# Whatever the coefficients, both must explain the values equally well.
MISFIT_ERROR = 1e-3


def low_rank(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """[pages, kv_heads, tokens, d]"""
    pages, kv_heads, tokens, d = shape
    basis = torch.randn(kv_heads, 12, d, generator=generator)
    noise = torch.randn(*shape, generator=generator)
    return torch.randn(pages, kv_heads, tokens, 12, generator=generator) @ basis + 0.3 * noise


def check_seal(
    name: str,
    config: LRQKSettings,
    dtype: torch.dtype = torch.float32,
    head_size: int = 64,
    kv_heads: int = 2,
    key_scale: float = 1.0,
) -> None:
    generator = torch.Generator().manual_seed(config.rank + config.page_size)
    n = config.page_size
    key = key_scale * low_rank(generator, 4, kv_heads, n, head_size)
    host = torch.stack([key, torch.randn(key.shape, generator=generator) + 0.5], 3).to(dtype)
    host[2] = torch.nan  # not sealed
    pages = torch.tensor([3, 0, 1])
    page_format = PageFormat.from_config(config, head_size)

    def empty_factors() -> FactorPages:
        return FactorPages(torch.full((4, kv_heads, page_format.page_bytes), 0xFF, dtype=torch.uint8), page_format)

    expected, actual = empty_factors(), empty_factors()
    seal_pages(pages, host, expected, config)
    with force_kernels(name) as kernels:
        kernels.seal_pages(pages, host, actual, config)
    assert (actual.raw[2] == 0xFF).all()
    query = torch.randn(5, 3 * kv_heads, head_size, generator=generator)
    table = pages.int().expand(5, 3)
    scores, truth = (proxy_scores(query, factors, table, head_size**-0.5) for factors in (actual, expected))
    assert relative_error(scores, truth) < SCORE_ERROR
    # Sums over the page in another order may round to the neighbouring bfloat16.
    assert relative_error(actual.value_mean[pages], expected.value_mean[pages]) < 1e-3
    if config.residual == "linear":
        estimate, truth = (linear_values(factors, pages) for factors in (actual, expected))
        assert relative_error(estimate, truth) < VALUE_ERROR * max(1.0, config.num_value_ranks / 16)
        value = host[pages][..., 1, :].float()
        deviation = value - value.mean(-2, keepdim=True)
        misfit, least = ((deviation - x).norm().item() for x in (estimate, truth))
        assert misfit == pytest.approx(least, rel=MISFIT_ERROR)


def linear_values(factors: FactorPages, pages: torch.Tensor) -> torch.Tensor:
    """What the key factors add to the mean value of the tokens: float32 [M, KV, N, d]."""
    leading = factors.key_factor(pages)[..., : factors.format.value_rank].float()
    centred = leading - factors.key_factor_mean[pages][:, :, None]
    return centred @ (factors.value_projection[pages].float() * factors.value_scale[pages][..., None])


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
class TestSealPages:
    @pytest.mark.parametrize("factor_dtype", ["int8", "bfloat16"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes(self, name: str, factor_dtype: str, dtype: torch.dtype) -> None:
        check_seal(name, LRQKSettings(page_size=64, factor_dtype=factor_dtype), dtype)

    @pytest.mark.parametrize("rank", [4, 8, 12, 16, 20, 32, 64])
    @pytest.mark.parametrize("head_size", [64, 80, 128])
    def test_rank_and_head_size(self, name: str, rank: int, head_size: int) -> None:
        check_seal(name, LRQKSettings(page_size=128, rank=rank), head_size=head_size)

    @pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256, 512])
    def test_page_size(self, name: str, page_size: int) -> None:
        check_seal(name, LRQKSettings(page_size=page_size, rank=8), head_size=96)

    @pytest.mark.parametrize("factor_dtype", ["int8", "bfloat16"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        ("rank", "head_size", "page_size"), [(16, 64, 64), (4, 128, 256), (20, 80, 128), (64, 128, 256)]
    )
    def test_linear_values(
        self, name: str, factor_dtype: str, dtype: torch.dtype, rank: int, head_size: int, page_size: int
    ) -> None:
        config = LRQKSettings(
            page_size=page_size, rank=rank, factor_dtype=factor_dtype, residual="linear", value_rank=8
        )
        check_seal(name, config, dtype, head_size)

    def test_linear_values_of_fewer_tokens_than_ranks(self, name: str) -> None:
        """The values can be met exactly, up to rounded coefficients; which of many solutions is found is open."""
        config = LRQKSettings(page_size=16, rank=32, value_rank=16, residual="linear")
        generator = torch.Generator().manual_seed(0)
        host = torch.randn(3, 2, 16, 2, 64, generator=generator)
        factors = FactorPages(
            torch.full((3, 2, PageFormat.from_config(config, 64).page_bytes), 0xFF, dtype=torch.uint8),
            PageFormat.from_config(config, 64),
        )
        pages = torch.arange(3)
        with force_kernels(name) as kernels:
            kernels.seal_pages(pages, host, factors, config)
        value = host[..., 1, :]
        estimate = factors.value_mean.float()[:, :, None] + linear_values(factors, pages)
        assert relative_error(estimate, value) < 5e-2

    @pytest.mark.parametrize("key_scale", [1e-4, 1e4])
    def test_magnitudes(self, name: str, key_scale: float) -> None:
        check_seal(name, LRQKSettings(page_size=64), key_scale=key_scale)

    def test_weights_and_iterations(self, name: str) -> None:
        check_seal(name, LRQKSettings(page_size=64, iterations=5, lambda_q=0.3, lambda_k=2.0))

    def test_zero_keys(self, name: str) -> None:
        config = LRQKSettings(page_size=16, rank=4)
        page_format = PageFormat(16, 64, 4)
        factors = FactorPages(torch.full((1, 1, page_format.page_bytes), 0xFF, dtype=torch.uint8), page_format)
        with force_kernels(name) as kernels:
            kernels.seal_pages(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, 16, 2, 64), factors, config)
        scores = proxy_scores(torch.randn(1, 1, 64), factors, torch.zeros(1, 1, dtype=torch.int32), 1.0)
        assert (scores == 0).all()

    def test_key_pca_is_left_to_torch(self, name: str) -> None:
        check_seal(name, LRQKSettings(page_size=64, factorization="key_pca"))

    def test_a_page_is_a_function_of_its_tokens(self, name: str) -> None:
        """Sealed alone, in company or under another id: the same bytes."""
        form = PageFormat(64, 64, 16)
        host = torch.randn(5, 3, 64, 2, 64)
        host[4] = host[1]
        together, alone = (FactorPages(torch.zeros(5, 3, form.page_bytes, dtype=torch.uint8), form) for _ in range(2))
        with force_kernels(name) as kernels:
            kernels.seal_pages(torch.tensor([3, 1, 0]), host, together, LRQKSettings(page_size=64))
            kernels.seal_pages(torch.tensor([4]), host, alone, LRQKSettings(page_size=64))
        assert torch.equal(together.raw[1], alone.raw[4])
        assert together.raw[1].any()

    def test_threads_do_not_change_the_result(self, name: str) -> None:
        config = LRQKSettings(page_size=64)
        page_format = PageFormat(64, 64, config.rank)
        host = torch.randn(5, 3, 64, 2, 64)
        threads, results = torch.get_num_threads(), []
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                factors = FactorPages(torch.zeros(5, 3, page_format.page_bytes, dtype=torch.uint8), page_format)
                with force_kernels(name) as kernels:
                    kernels.seal_pages(torch.arange(5), host, factors, config)
                results.append(factors.raw)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(results[0], results[1])
