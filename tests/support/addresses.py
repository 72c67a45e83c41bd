"""Addresses of rows as attention on a device takes them, for rows that lie in the host pages."""

import torch


def host_addresses(rows: torch.Tensor, block_table: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
    """Addresses of token positions in the host pages: int64 [B, KV, R], bytes; -1 where there is no row.

    Args:
        rows: int [B, KV, R], -1 for none.
        host: [num_pages, KV, N, 2, d].
    """
    page_size = host.shape[2]
    position = rows.long().clamp_min(0)
    page = block_table.long().gather(1, (position // page_size).flatten(1)).view_as(position)
    head = torch.arange(rows.shape[1], device=rows.device)[None, :, None]
    element = page * host.stride(0) + head * host.stride(1) + position % page_size * host.stride(2)
    return torch.where(rows >= 0, element * host.element_size(), -1)
