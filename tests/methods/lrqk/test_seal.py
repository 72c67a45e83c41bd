from dataclasses import replace
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import empty_factors, host_pages, page_scores, relative, sealed

from vllm_lrqk.evaluation.reference.published import factorize_prompt
from vllm_lrqk.methods.lrqk.seal import _top_columns, lrqk_projections, seal_pages
from vllm_lrqk.methods.lrqk.settings import LRQKSettings
from vllm_lrqk.methods.lrqk.values import value_regression, values_first

RANKS = st.integers(1, 8).map(lambda n: 4 * n)
PAGE_SIZES = st.sampled_from([16, 32, 64, 128, 256])
HEAD_SIZES = st.sampled_from([64, 96, 128])
SEEDS = st.integers(0, 2**31)
FACTOR_DTYPES = st.sampled_from(["int8", "bfloat16"])
FACTORIZATIONS = st.sampled_from(["lrqk", "key_pca"])
EXAMPLES = settings(max_examples=30, deadline=None)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decaying(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows [..., d] whose variance falls off like that of real keys: most of it in few directions."""
    d = shape[-1]
    basis, _ = torch.linalg.qr(normal(d, d, seed=seed))
    return normal(*shape, seed=seed + 1) * torch.arange(1, d + 1).float().pow(-1.0) @ basis.T * d**0.5


@EXAMPLES
@given(SEEDS, st.integers(20, 200), st.sampled_from([16, 32, 64]), st.sampled_from([4, 8, 12]), st.integers(1, 6))
def test_gram_form_is_the_explicit_iterate(seed, tokens, d, rank, iterations):
    """A_Q = Q X and A_K = K Y are the published iterates from the same start.

    Float64 and a small ridge, so that little but conditions of up to 1e6 remains. Compared are the scores A_Q A_K',
    which do not depend on how a basis is scaled.
    """
    query, key = decaying(tokens, d, seed=seed).double(), decaying(tokens, d, seed=seed + 7).double()
    gram_q, gram_k = query.T @ query, key.T @ key
    with patch("vllm_lrqk.methods.lrqk.values.RIDGE", 1e-10):
        x, y = lrqk_projections(gram_q, gram_k, rank, iterations, 1.0, 1.0)
    columns = _top_columns(gram_q, gram_k, rank)
    explicit = factorize_prompt(query, key, query @ columns, key @ columns, iterations, tolerance=0.0)
    assert relative(query @ x @ (key @ y).T, explicit.a_q @ explicit.a_k.T) < 1e-4


@EXAMPLES
@given(SEEDS, PAGE_SIZES, HEAD_SIZES, RANKS, FACTORIZATIONS)
def test_int8_round_trip(seed, page_size, d, rank, factorization):
    """An int8 page holds each element of A and X of the bfloat16 page within half a step and bfloat16's rounding."""
    config = LRQKSettings(rank=rank, page_size=page_size, factorization=factorization)
    keys = decaying(2, 3, page_size, d, seed=seed)
    stored = sealed(keys, config)
    fine = sealed(keys, replace(config, factor_dtype="bfloat16"))
    assert bool((fine.projection_scale == 1).all())
    pages = torch.arange(2)
    fine_a, fine_x = fine.key_factor(pages).double(), fine.projection.double()
    a_step, x_step = fine_a.abs().amax(-2, keepdim=True) / 127, fine_x.abs().amax(-1, keepdim=True) / 127
    torch.testing.assert_close(stored.projection_scale.double(), (a_step.mT * x_step)[..., 0], rtol=2**-7, atol=0)
    a, x = stored.key_factor(pages).double() * a_step, stored.projection.double() * x_step
    # 0.51: the step itself was found from a rounded maximum.
    assert bool(((a - fine_a).abs() <= 0.51 * a_step + 2**-7 * a.abs()).all())
    assert bool(((x - fine_x).abs() <= 0.51 * x_step + 2**-7 * x.abs()).all())


@EXAMPLES
@given(SEEDS, PAGE_SIZES, HEAD_SIZES, RANKS, FACTOR_DTYPES)
def test_every_byte_that_is_read_was_written(seed, page_size, d, rank, dtype):
    """Pages sealed over different bytes read the same, hold no NaN, and leave all other pages alone."""
    config = LRQKSettings(rank=rank, page_size=page_size, factor_dtype=dtype)
    host = host_pages(decaying(4, 2, page_size, d, seed=seed), normal(4, 2, page_size, d, seed=seed))
    target = torch.tensor([3, 1])
    written = []
    for fill in (0xFF, 0x5A):
        factors = empty_factors(config, d, 4, 2, fill)
        seal_pages(target, host, factors, config)
        assert bool((factors.raw[[0, 2]] == fill).all())
        written.append(
            [factors.key_factor(target), *(part[target] for part in (factors.projection, factors.projection_scale))]
        )
        written[-1].append(factors.value_mean[target])
    for first, second in zip(*written):
        assert torch.equal(first, second)
        assert bool(first.float().isfinite().all())
    mean = host[target, :, :, 1].mean(-2)
    torch.testing.assert_close(written[0][3].float(), mean, rtol=2**-8, atol=1e-6)  # rounded to bfloat16


@pytest.mark.parametrize("factorization", ["lrqk", "key_pca"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e4, 1.0, 1e-4])
def test_scores_are_as_good_at_every_magnitude(factorization, dtype, size):
    """Scores of rank-6 keys through rank-16 factors: exact up to two int8 roundings (1 %) and the host's own."""
    keys = normal(2, 2, 64, 6) @ normal(6, 96, seed=1) * size / 6
    config = LRQKSettings(rank=16, page_size=64, factorization=factorization)
    query = normal(20, 96, seed=2)
    scores = page_scores(sealed(keys.to(dtype), config), query)
    assert relative(scores, query @ keys.mT) < 0.02


@pytest.mark.parametrize("factorization", ["lrqk", "key_pca"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_degenerate_pages(factorization, dtype):
    """All-zero keys, one repeated key, one key in a page of zeros: finite, and right."""
    keys = torch.zeros(3, 1, 32, 64)
    keys[1] = normal(64)
    keys[2, 0, 5] = normal(64, seed=1)
    config = LRQKSettings(rank=16, page_size=32, factorization=factorization)
    query = normal(10, 64, seed=2)
    factors = sealed(keys.to(dtype), config)
    key_factor = factors.key_factor(torch.arange(3))
    for part in (factors.projection, factors.projection_scale, factors.value_mean, key_factor):
        assert bool(part.float().isfinite().all())
    scores, expected = page_scores(factors, query), (query @ keys.mT).double()
    assert float(scores[0].abs().max()) == 0.0
    # 16 columns share one direction; their int8 roundings add up.
    assert relative(scores[1], expected[1]) < 0.03
    assert relative(scores[2], expected[2]) < 0.03


def test_more_rank_is_better():
    keys, query = decaying(4, 2, 128, 64), decaying(200, 64, seed=5)
    errors = []
    for rank in (4, 8, 16, 32):
        factors = sealed(keys, LRQKSettings(rank=rank, page_size=128))
        errors.append(relative(page_scores(factors, query), query @ keys.mT))
    assert all(later < 0.9 * earlier for earlier, later in pairwise(errors))


@EXAMPLES
@given(SEEDS, st.sampled_from([64, 128, 256]), HEAD_SIZES, FACTOR_DTYPES)
def test_values_that_follow_a_few_directions_of_the_key_factors_are_found(seed, page_size, d, dtype):
    """Values that are linear in 8 of 16 directions come back up to the rounding of factors and coefficients.

    3e-2: columns are rounded in steps of 1/127 of their largest element, some 3 standard deviations; 8 of them add up.
    """
    config = LRQKSettings(page_size=page_size, factor_dtype=dtype, residual="linear", value_rank=8)
    keys = decaying(2, 3, page_size, d, seed=seed)
    pages = torch.arange(2)
    key_factor = sealed(keys, config).key_factor(pages).float()
    directions = normal(2, 3, config.rank, 8, seed=seed) / key_factor.std(-2)[..., None]
    values = key_factor @ directions @ normal(2, 3, 8, d, seed=seed + 1) + 1.0
    factors = sealed(keys, config, values=values)
    centred = factors.key_factor(pages)[..., :8].float() - factors.key_factor_mean[:, :, None]
    projection = factors.value_projection.float() * factors.value_scale[..., None]
    estimate = factors.value_mean.float()[:, :, None] + centred @ projection
    assert relative(estimate, values) < 3e-2


@EXAMPLES
@given(SEEDS, st.sampled_from([16, 64, 256]), st.sampled_from([4, 8, 16]))
def test_another_basis_gives_the_same_scores(seed, page_size, rank):
    """X Y' stays what it was, up to float32 rounding times conditions of up to 1e2."""
    x, y = normal(3, 64, rank, seed=seed), normal(3, 64, rank, seed=seed + 1)
    key, value = decaying(3, page_size, 64, seed=seed), normal(3, page_size, 64, seed=seed + 2)
    new_x, new_y = values_first(x, y, key, value)
    assert relative(new_x @ new_y.mT, x @ y.mT) < 1e-3
    a = key @ new_y
    a = a - a.mean(-2, keepdim=True)
    if page_size > 2 * rank:
        # Uncorrelated, each with a sum of squares of 1, up to the ridge.
        assert relative(a.mT @ a, torch.eye(rank).expand(3, -1, -1)) < 0.1


def test_leading_columns_explain_most():
    """The best 4 of 16 columns, and what any 4 of them in the old basis explain at most."""
    x, y = normal(64, 16), normal(64, 16, seed=1)
    key = normal(256, 64, seed=2)
    value = (key @ y)[:, 5:9] @ normal(4, 32, seed=3) + 0.1 * (key @ y) @ normal(16, 32, seed=4)

    def unexplained(a: torch.Tensor) -> float:
        a, v = a - a.mean(0), value - value.mean(0)
        return float((v - a @ torch.linalg.lstsq(a, v).solution).norm() / v.norm())

    _, new_y = values_first(x, y, key, value)
    best = unexplained((key @ new_y)[:, :4])
    assert best < 0.25
    assert best <= unexplained((key @ y)[:, 5:9]) + 1e-3


def test_a_constant_key_factor_explains_no_value():
    mean, coefficients = value_regression(torch.full((2, 16, 4), 3.0), normal(2, 16, 8))
    assert bool((mean == 3).all())
    assert bool((coefficients == 0).all())


def test_pages_of_equal_keys_and_of_zeros_are_sealed():
    config = LRQKSettings(page_size=16, residual="linear")
    for keys in (torch.zeros(1, 1, 16, 64), normal(64).expand(1, 1, 16, 64)):
        factors = sealed(keys, config, values=normal(1, 1, 16, 64))
        for section in (factors.projection, factors.projection_scale, factors.value_projection, factors.value_scale):
            assert bool(section.float().isfinite().all())
        torch.testing.assert_close(
            page_scores(factors, normal(2, 64)), normal(2, 64).double() @ keys.double().mT, rtol=2e-2, atol=0.1
        )
