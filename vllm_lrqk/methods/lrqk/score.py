"""Proxy scores through the factors, and the selection that they lead to: the plain torch form.

Shapes: B requests, H query heads, KV kv heads, G = H / KV, d head size, N page tokens, P pages, k selected.
"""

import torch

from vllm_lrqk.core.logits import PLAIN, Logits
from vllm_lrqk.core.selection import Selection, always_rows, candidate_range, heaviest
from vllm_lrqk.methods.lrqk.calibrated_format import CalibratedPages
from vllm_lrqk.methods.lrqk.calibrated_score import calibrated_scores
from vllm_lrqk.methods.lrqk.format import FactorPages
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

Factors = FactorPages | CalibratedPages


def proxy_scores(query: torch.Tensor, factors: Factors, block_table: torch.Tensor, scale: float) -> torch.Tensor:
    """Scores s~ of every token of the given pages.

    Args:
        query: [B, H, d].
        block_table: int [B, P], page ids; any valid id where a request has fewer pages.

    Returns:
        float32 [B, H, P, N].
    """
    if isinstance(factors, CalibratedPages):
        return calibrated_scores(query, factors, block_table, scale)
    kv_heads = factors.raw.shape[1]
    pages = block_table.long()
    grouped = query.float().unflatten(1, (kv_heads, -1)) * scale  # [B, KV, G, d]
    projected = torch.einsum("bkgd,bpkrd->bpkgr", grouped, factors.projection[pages].float())
    projected = projected * factors.projection_scale[pages][:, :, :, None, :]
    scores = projected @ factors.key_factor(pages).float().mT  # [B, P, KV, G, N]
    return scores.permute(0, 2, 3, 1, 4).flatten(1, 2)


def select(
    query: torch.Tensor,
    factors: Factors,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    config: LRQKSettings,
    logits: Logits = PLAIN,
) -> Selection:
    """Choose the rows of one decode step; `seq_lens` [B] counts the current token.

    Always attended: sink tokens, the last `recent_tokens`, tokens of the unsealed page. Of the others,
    the candidates, the top_k by the group's summed softmax weight of the proxy scores, as far as top_p goes. Proxy
    scores have the soft cap of the logits; sinks have no part in the choice.
    """
    n, kv_heads = config.page_size, factors.raw.shape[1]
    first, end = candidate_range(seq_lens, config)
    always = always_rows(seq_lens, end, config)[:, None].expand(-1, kv_heads, -1)
    longest = int(end.max())
    if longest <= first:
        return Selection(always.int(), None)
    num_pages = -(-longest // n)
    scores = logits.capped(proxy_scores(query, factors, block_table[:, :num_pages], scale))  # [B, H, P, N]
    position = torch.arange(num_pages * n, device=query.device)
    is_candidate = (position >= first) & (position < end[:, None])  # [B, P*N]
    scores = scores.flatten(2).masked_fill(~is_candidate[:, None], -torch.inf)  # [B, H, P*N]
    # A request without candidates has -inf everywhere; its softmax is replaced by zeros.
    weight = scores.softmax(-1).nan_to_num(0.0).unflatten(1, (kv_heads, -1)).sum(2)  # [B, KV, P*N]
    weight = weight.masked_fill(~is_candidate[:, None], -1.0)
    group = scores.shape[1] // kv_heads
    tokens, is_selected = heaviest(weight, group, config)
    rows = torch.where(is_selected, tokens, -1)
    residual = moment = None
    if config.residual != "none":
        chosen = torch.zeros_like(weight, dtype=torch.bool).scatter_(-1, tokens, is_selected)
        left = scores.masked_fill(chosen.repeat_interleave(group, 1), -torch.inf).unflatten(-1, (num_pages, n))
        residual = left.logsumexp(-1)
        if config.residual == "linear":
            moment = moments(left, residual, factors, block_table[:, :num_pages].long())
    return Selection(torch.cat([rows, always], -1).int(), residual, moment)


def moments(left: torch.Tensor, residual: torch.Tensor, factors: Factors, pages: torch.Tensor) -> torch.Tensor:
    """`Selection.moment`.

    Args:
        left: float32 [B, H, P, N], scores of the unselected candidates, -inf elsewhere.
        residual: float32 [B, H, P], their log-sum-exp.
        pages: int64 [B, P], any valid page where nothing is left.
    """
    kv_heads, columns = factors.raw.shape[1], factors.format.value_rank
    key_factor = factors.key_factor(pages)[..., :columns].float().transpose(1, 2)  # [B, KV, P, N, columns]
    share = left.softmax(-1).unflatten(1, (kv_heads, -1)).transpose(2, 3)  # [B, KV, P, G, N]
    mean = (share @ key_factor).transpose(2, 3).flatten(1, 2)
    return mean.masked_fill(residual.isinf()[..., None], 0.0)
