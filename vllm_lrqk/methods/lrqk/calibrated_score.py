"""Proxy scores through calibrated factors: the plain torch form.

Shapes: B requests, H query heads, KV kv heads, G = H / KV, d head size, N page tokens, P pages, r columns.
"""

import torch

from vllm_lrqk.methods.lrqk.calibrated_format import CalibratedPages


def calibrated_scores(
    query: torch.Tensor, factors: CalibratedPages, block_table: torch.Tensor, scale: float
) -> torch.Tensor:
    """Proxy scores s~ of every token of the given pages.

    Args:
        query: [B, H, d].
        block_table: int [B, P], ids of the pages from the request's first on; any valid id where it has fewer.

    Returns:
        float32 [B, H, P, N].
    """
    kv_heads, pages = factors.raw.shape[1], block_table.long()
    numbers = torch.arange(pages.shape[1], device=pages.device)
    framed = factors.basis.frames.rotate(query.float()[:, :, None] * scale, numbers, backwards=True)  # [B, H, P, d]
    projected = framed.unflatten(1, (kv_heads, -1)).transpose(2, 3) @ factors.basis.query[:, None]  # [B, KV, P, G, r]
    projected = projected * factors.projection_scale[pages].transpose(1, 2)[:, :, :, None].float()
    scores = projected @ factors.key_factor(pages).transpose(1, 2).float().mT  # [B, KV, P, G, N]
    return scores.transpose(2, 3).flatten(1, 2)
