"""Exact attention over the selected rows plus the residual of the others: the plain torch form."""

import torch

from vllm_lrqk.core.logits import PLAIN, Logits
from vllm_lrqk.core.selection import Selection


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
    residual_values: torch.Tensor | None,
    scale: float,
    logits: Logits = PLAIN,
) -> torch.Tensor:
    """One decode step's attention output.

    With S the attended rows, exact scores s and R_p the exponential of `selection.residual`:

        out = (sum_{n in S} e^{s_n} v_n + sum_p R_p u_p) / (sum_{n in S} e^{s_n} + sum_p R_p)

    where u_p, the page's row of `residual_values`, stands for the mean value of the tokens which R_p sums over. The
    sink of a head adds its exponential to the denominator.

    Args:
        query: [B, H, d].
        rows_kv: [B, KV, R, 2, d], keys and values of `selection.positions`.
        residual_values: float32 [B, KV, G or 1, P, d]; None without a residual.

    Returns:
        float32 [B, H, d].
    """
    kv_heads = rows_kv.shape[1]
    grouped = query.float().unflatten(1, (kv_heads, -1)) * scale
    key, value = rows_kv[..., 0, :].float(), rows_kv[..., 1, :].float()
    is_row = (selection.positions >= 0)[:, :, None, :, None]
    scores = logits.capped(grouped @ key.mT).masked_fill(~is_row[..., 0], -torch.inf)  # [B, KV, G, R]
    value = value.masked_fill(~is_row[:, :, 0], 0.0)
    rows, terms = scores.shape[-1], [scores]
    if logits.sinks is not None:
        terms.append(logits.sinks.view(1, kv_heads, -1, 1).expand(len(query), -1, -1, 1))
    if selection.residual is None or residual_values is None:
        return (torch.cat(terms, -1).softmax(-1)[..., :rows] @ value).flatten(1, 2)
    residual = selection.residual.unflatten(1, (kv_heads, -1))  # [B, KV, G, P]
    num_pages = residual.shape[-1]
    weight = torch.cat([*terms, residual], -1).softmax(-1)
    of_rows = weight[..., :rows] @ value
    return (of_rows + (weight[..., None, -num_pages:] @ residual_values)[..., 0, :]).flatten(1, 2)
