"""Values that follow the key factors: what tokens count as that are not selected, and the fit behind it."""

import torch

from vllm_lrqk.core.selection import Selection
from vllm_lrqk.methods.lrqk.calibrated_format import CalibratedPages
from vllm_lrqk.methods.lrqk.format import FactorPages

RIDGE = 1e-4
VALUE_SHIFT = 1e-3
"""Of the mean eigenvalue, so that orthogonal iteration stays well conditioned."""
VALUE_ITERATIONS = 4


def solve_right(numerator: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """numerator @ gram^-1 with a ridge relative to the mean diagonal; numerator [..., m, r], gram [..., r, r]."""
    # solve_ex: solve would wait for the device to look for singular matrices, which the ridge rules out.
    return torch.linalg.solve_ex(gram + _ridge(gram), numerator.mT)[0].mT


def _ridge(gram: torch.Tensor, share: float | None = None) -> torch.Tensor:
    """A share, RIDGE by default, of the mean diagonal of [..., r, r], times identity."""
    mean_diagonal = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    size = (mean_diagonal * (RIDGE if share is None else share)).clamp_min(torch.finfo(gram.dtype).tiny)
    return size * torch.eye(gram.shape[-1], device=gram.device)


def values_first(
    x: torch.Tensor, y: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product X Y' in another basis: columns of the key factor in the order in which they explain values.

    With A the centred key factor K Y, L L' = A'A and orthonormal Q, the columns of A L'^-1 Q are uncorrelated. Q holds
    the eigenvectors of what a least squares fit explains, (L^-1 A'V)(L^-1 A'V)', by orthogonal iteration: roughly, as
    any Q is right and the leading columns only have to do well together.

    Args:
        x, y: float32 [..., d, r].
        key, value: float32 [..., N, d].
    """
    a = key @ y
    a = a - a.mean(-2, keepdim=True)
    gram = a.mT @ a
    lower = torch.linalg.cholesky_ex(gram + _ridge(gram))[0]
    explained = torch.linalg.solve_triangular(lower, a.mT @ value, upper=False)
    size = explained @ explained.mT
    size = size + _ridge(size, VALUE_SHIFT)
    q = torch.eye(y.shape[-1], device=y.device).expand_as(size)
    for _ in range(VALUE_ITERATIONS):
        q = _orthonormal_columns(size @ q)
    return x @ (lower @ q), y @ torch.linalg.solve_triangular(lower.mT, q, upper=True)


def _orthonormal_columns(matrix: torch.Tensor) -> torch.Tensor:
    """What Gram-Schmidt makes of the columns of [..., r, r], by one Cholesky factor: its condition takes float64."""
    wide = matrix.double()
    upper = torch.linalg.cholesky_ex(wide.mT @ wide, upper=True)[0]
    return torch.linalg.solve_triangular(upper, wide, upper=True, left=False).to(matrix.dtype)


def value_regression(key_factor: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares of a page's values on its key factors, both without their means.

    Args:
        key_factor: float32 [..., N, r], as stored.
        value: float32 [..., N, d].

    Returns:
        The mean key factor, float32 [..., r], and the coefficients, float32 [..., d, r].
    """
    mean = key_factor.mean(-2)
    centred = key_factor - mean[..., None, :]
    return mean, solve_right(value.mT @ centred, centred.mT @ centred)


def residual_values(selection: Selection, factors: FactorPages | CalibratedPages, pages: torch.Tensor) -> torch.Tensor:
    """What the tokens of each page that are not selected count as: float32 [B, KV, G or 1, P, d].

    Args:
        pages: int64 [B, P].
    """
    assert selection.residual is not None
    kv_heads = factors.raw.shape[1]
    residual = selection.residual.unflatten(1, (kv_heads, -1))
    value = factors.value_mean[pages].transpose(1, 2).float()[:, :, None]  # [B, KV, 1, P, d]
    if selection.moment is not None:
        offset = selection.moment.unflatten(1, (kv_heads, -1))
        offset = (
            offset - factors.key_factor_mean[pages].transpose(1, 2)[:, :, None].float()
        )  # [B, KV, G, P, value_rank]
        value_map = factors.value_map(pages).transpose(1, 2)[:, :, None]
        value = value + (offset[..., None, :] @ value_map)[..., 0, :]
    # Pages without residual may be unsealed: their bytes mean nothing.
    return value.masked_fill(~(residual > -torch.inf).any(2)[:, :, None, :, None], 0.0)
