"""One decode step of one layer, straight from the host pages: the plain torch form."""

import torch

from vllm_lrqk.core.attend import attend, gather_rows
from vllm_lrqk.core.logits import PLAIN, Logits
from vllm_lrqk.core.selection import Selection
from vllm_lrqk.methods.lrqk.calibrated_format import CalibratedPages
from vllm_lrqk.methods.lrqk.format import FactorPages
from vllm_lrqk.methods.lrqk.score import select
from vllm_lrqk.methods.lrqk.settings import LRQKSettings
from vllm_lrqk.methods.lrqk.values import residual_values


def decode_attention(
    query: torch.Tensor,
    host: torch.Tensor,
    factors: FactorPages | CalibratedPages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    config: LRQKSettings,
    output: torch.Tensor,
    logits: Logits = PLAIN,
) -> torch.Tensor:
    """Select and attend for one query token per request; its own key and value are already in the host pages.

    Args:
        query, output: [B, H, d].
        host: [num_pages, KV, N, 2, d].
        block_table: int [B, P]; entries past a request's last page are never used.
        seq_lens: int [B], the current token included.

    Returns:
        int64 [B], the number of rows attended exactly, summed over KV heads.
    """
    selection = select(query, factors, block_table, seq_lens, scale, config, logits)
    rows_kv = gather_rows(host, block_table, selection.positions)
    output.copy_(attend_selection(query, rows_kv, selection, factors, block_table, scale, logits))
    return (selection.positions >= 0).sum((1, 2))


def attend_selection(
    query: torch.Tensor,
    rows_kv: torch.Tensor,
    selection: Selection,
    factors: FactorPages | CalibratedPages,
    block_table: torch.Tensor,
    scale: float,
    logits: Logits = PLAIN,
) -> torch.Tensor:
    """Attention to the selected rows and, through the factors, to the residual: float32 [B, H, d].

    Args:
        query: [B, H, d].
        rows_kv: [B, KV, R, 2, d], keys and values of `selection.positions`.
        block_table: int [B, P].
    """
    left = None
    if selection.residual is not None:
        pages = block_table[:, : selection.residual.shape[-1]].long()
        left = residual_values(selection, factors, pages)
    return attend(query, rows_kv, selection, left, scale, logits)
