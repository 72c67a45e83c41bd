"""Exact attention over the selected rows plus the residual of the others: the plain torch form."""

import torch

from vllm_lrqk.page import FactorPages
from vllm_lrqk.select import Selection


def gather_rows(host: torch.Tensor, block_table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Keys and values of token positions, straight from the host pages.

    Args:
        host: [num_pages, KV, N, 2, d].
        block_table: int [B, P].
        rows: int [B, KV, R], token positions; -1 reads an arbitrary row.

    Returns:
        [B, KV, R, 2, d].
    """
    page_size = host.shape[2]
    position = rows.long().clamp_min(0)
    index = (position // page_size).flatten(1)
    page = block_table.long().gather(1, index).unflatten(1, rows.shape[1:])
    head = torch.arange(host.shape[1], device=host.device)[None, :, None]
    return host[page, head, position % page_size]


def attend(
    query: torch.Tensor,
    rows_kv: torch.Tensor,
    selection: Selection,
    factors: FactorPages,
    block_table: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """One decode step's attention output.

    With S the attended rows, exact scores s and R_p the exponential of `selection.residual`:

        out = (sum_{n in S} e^{s_n} v_n + sum_p R_p vbar_p) / (sum_{n in S} e^{s_n} + sum_p R_p)

    Args:
        query: [B, H, d].
        rows_kv: [B, KV, R, 2, d], keys and values of `selection.rows`.

    Returns:
        float32 [B, H, d].
    """
    kv_heads = rows_kv.shape[1]
    grouped = query.float().unflatten(1, (kv_heads, -1)) * scale
    key, value = rows_kv[..., 0, :].float(), rows_kv[..., 1, :].float()
    is_row = (selection.rows >= 0)[:, :, None, :, None]
    scores = (grouped @ key.mT).masked_fill(~is_row[..., 0], -torch.inf)  # [B, KV, G, R]
    value = value.masked_fill(~is_row[:, :, 0], 0.0)
    if selection.residual is not None:
        residual = selection.residual.unflatten(1, (kv_heads, -1))  # [B, KV, G, P]
        pages = block_table[:, : residual.shape[-1]].long()
        mean = factors.value_mean[pages].transpose(1, 2).float()  # [B, KV, P, d]
        # Pages without residual may be unsealed: their bytes mean nothing.
        mean = mean.masked_fill(~(residual > -torch.inf).any(2)[..., None], 0.0)
        scores = torch.cat([scores, residual], -1)
        value = torch.cat([value, mean], -2)
    return (scores.softmax(-1) @ value).flatten(1, 2)
