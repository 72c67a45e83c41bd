"""Factorising the keys of sealed pages: the plain torch form.

Every iterate of LRQK (Li et al., NeurIPS 2025, arXiv 2510.23649, section 3) on one page has the form
A_Q = Q X, A_K = K Y with X, Y in R^{d x r}, so the whole fit needs only the Gram matrices
G_Q = Q'Q and G_K = K'K. The proxy score of token n for query q is (q X) . (K Y)_n.

Which queries will come is not known when a page is sealed, and those at hand depend on how a prompt was cut into
chunks. The page's own keys stand in for them, so that factors are a function of the page's tokens alone.
"""

import torch

from vllm_lrqk.methods.lrqk.format import FactorPages
from vllm_lrqk.methods.lrqk.settings import LRQKSettings
from vllm_lrqk.methods.lrqk.values import solve_right, value_regression, values_first

KEY_SHARE = 0.5
"""Share of the page's own keys in G_Q; the rest is identity, for queries that look elsewhere."""


def _top_columns(gram_q: torch.Tensor, gram_k: torch.Tensor, rank: int) -> torch.Tensor:
    """Coordinate columns with the largest |Q| |K|, the start of the fit: one-hot [..., d, r].

    The published "topcol" adds the two; the product is what a coordinate brings to the scores, at any magnitudes.
    """
    size = gram_q.diagonal(dim1=-2, dim2=-1) * gram_k.diagonal(dim1=-2, dim2=-1)
    columns = size.topk(rank, dim=-1).indices[..., None, :]
    return torch.zeros_like(gram_q[..., :rank]).scatter_(-2, columns, 1.0)


def lrqk_projections(
    gram_q: torch.Tensor, gram_k: torch.Tensor, rank: int, iterations: int, lambda_q: float, lambda_k: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Projections of the page-local LRQK fit.

    Args:
        gram_q, gram_k: float32 [..., d, d], Q'Q and K'K of one page.

    Returns:
        X, Y: float32 [..., d, r].
    """
    x = y = _top_columns(gram_q, gram_k, rank)
    for _ in range(iterations):
        gq_x, gk_y = gram_q @ x, gram_k @ y
        x_gram, y_gram = x.mT @ gq_x, y.mT @ gk_y
        # B' = G X (X'G X)^-1, because G is symmetric.
        b_q = solve_right(gq_x, x_gram)  # [..., d, r] = B_Q'
        b_k = solve_right(gk_y, y_gram)
        x = solve_right(gk_y + lambda_q * b_q, y_gram + lambda_q * (b_q.mT @ b_q))
        gq_x = gram_q @ x
        y = solve_right(gq_x + lambda_k * b_k, x.mT @ gq_x + lambda_k * (b_k.mT @ b_k))
    return x, y


def _normalized(gram: torch.Tensor, mean_diagonal: float) -> torch.Tensor:
    """Gram matrices [..., d, d] scaled to one mean diagonal; zero stays zero."""
    size = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return torch.where(size > 0, gram * (mean_diagonal / size.clamp_min(torch.finfo(gram.dtype).tiny)), 0.0)


def _query_metric(gram_k: torch.Tensor) -> torch.Tensor:
    """G_Q of the fit, float32 [..., d, d], from K'K: the page's own keys and identity."""
    return KEY_SHARE * _normalized(gram_k, 1.0) + (1 - KEY_SHARE) * torch.eye(gram_k.shape[-1], device=gram_k.device)


def key_pca_projections(gram_k: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Leading eigenvectors of K'K, for both projections: float32 [..., d, r] twice."""
    vectors = torch.linalg.eigh(gram_k).eigenvectors[..., -rank:]
    return vectors, vectors


def _quantize_columns(matrix: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of [..., n, r] in `dtype`; int8 gets one scale per column, float32 [..., r]."""
    if dtype != torch.int8:
        return matrix.to(dtype), torch.ones_like(matrix[..., 0, :])
    scale = matrix.abs().amax(-2).clamp_min(1e-30) / 127
    return (matrix / scale[..., None, :]).round().clamp(-127, 127).to(torch.int8), scale


def seal_pages(pages: torch.Tensor, host: torch.Tensor, factors: FactorPages, config: LRQKSettings) -> None:
    """Factorise full pages and write their factor pages.

    Args:
        pages: int64 [M], distinct page ids.
        host: [num_pages, kv_heads, N, 2, d], the layer's host pages (keys at 0, values at 1).
    """
    seal_rows(pages, host[pages], factors, config)


def seal_rows(pages: torch.Tensor, rows: torch.Tensor, factors: FactorPages, config: LRQKSettings) -> None:
    """As `seal_pages`, from the pages' own rows [M, kv_heads, N, 2, d]."""
    f = factors.format
    key, value = rows[..., 0, :].float(), rows[..., 1, :].float()
    gram_k = key.mT @ key
    if config.factorization == "key_pca":
        x, y = key_pca_projections(gram_k, f.rank)
    else:
        # Magnitudes of Q and K say nothing about which directions matter, but would shift the weight of lambda.
        tokens = float(f.page_size)
        metric, normal_gram_k = tokens * _query_metric(gram_k), _normalized(gram_k, tokens)
        x, y = lrqk_projections(metric, normal_gram_k, f.rank, config.iterations, config.lambda_q, config.lambda_k)
    if 0 < f.value_rank < f.rank:
        x, y = values_first(x, y, key, value)
    # Balance the columns: only the product of a column of A and one of X matters.
    x_size = x.norm(dim=-2, keepdim=True).clamp_min(1e-30)
    key_factor, key_scale = _quantize_columns(key @ (y * x_size), f.factor_dtype)
    projection, projection_scale = _quantize_columns(x / x_size, f.factor_dtype)
    words = key_factor.unflatten(-1, (f.rank // f.word_elements, f.word_elements)).transpose(-3, -2)
    factors.key_factor_words[pages] = words
    factors.projection[pages] = projection.mT
    factors.projection_scale[pages] = key_scale * projection_scale
    factors.value_mean[pages] = value.mean(-2).to(torch.bfloat16)
    if f.value_rank:
        key_factor_mean, value_projection = value_regression(key_factor[..., : f.value_rank].float(), value)
        value_projection, value_scale = _quantize_columns(value_projection, f.factor_dtype)
        factors.key_factor_mean[pages] = key_factor_mean
        factors.value_projection[pages] = value_projection.mT
        factors.value_scale[pages] = value_scale
