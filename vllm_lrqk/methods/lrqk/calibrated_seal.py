"""Factorising the keys of sealed pages in a calibrated basis: the plain torch form.

A page is a function of its tokens alone.
"""

import torch

from vllm_lrqk.methods.lrqk.calibrated_format import CalibratedPages
from vllm_lrqk.methods.lrqk.values import value_regression


def seal_pages(
    pages: torch.Tensor,
    page_numbers: torch.Tensor,
    host: torch.Tensor,
    factors: CalibratedPages,
) -> None:
    """Factorise full pages and write their factor pages.

    Args:
        pages: int64 [M], distinct page ids.
        page_numbers: int64 [M], where in its request each page is, from 0.
        host: [num_pages, kv_heads, N, 2, d], the layer's host pages (keys at 0, values at 1).
    """
    f, basis = factors.format, factors.basis
    rows = host[pages].float()
    key, value = rows[..., 0, :], rows[..., 1, :]  # [M, KV, N, d]
    framed = basis.frames.rotate(key, page_numbers[:, None, None], backwards=True)
    key_factor, scale = _quantize(framed @ basis.key, f.leading_rank)
    factors.write_key_factor(pages, key_factor)
    factors.projection_scale[pages] = scale
    factors.value_mean[pages] = value.mean(-2).to(torch.bfloat16)
    mean, value_map = value_regression(key_factor.float(), value)  # [M, KV, r], [M, KV, d, r]
    factors.key_factor_mean[pages] = mean.to(torch.float16)
    if f.has_value_map:
        projection, value_scale = _quantize(value_map, 0)
        factors.write_value_projection(pages, projection.mT)
        factors.value_scale[pages] = value_scale


def _quantize(matrix: torch.Tensor, leading: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of [..., n, r] as int8, from -127 to 127 the leading ones and from -7 to 7 the others, and their scales.

    Returns:
        int8 [..., n, r] and bfloat16 [..., r].
    """
    highest = torch.full(matrix.shape[-1:], 7.0)
    highest[:leading] = 127.0
    highest = highest.to(matrix.device)
    scale = (matrix.abs().amax(-2).clamp_min(1e-30) / highest).to(torch.bfloat16)
    steps = (matrix / scale.float()[..., None, :]).round()
    return steps.clamp(-highest, highest).to(torch.int8), scale
