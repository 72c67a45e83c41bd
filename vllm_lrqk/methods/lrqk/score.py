"""Proxy scores through the factors, and the selection they lead to: the plain torch form.

Shapes: B requests, H query heads, KV kv heads, G = H / KV, d head size, N page tokens, P pages, k selected.
"""

from dataclasses import dataclass

import torch

from vllm_lrqk.methods.lrqk.format import FactorPages
from vllm_lrqk.methods.lrqk.settings import LRQKConfig


@dataclass
class Selection:
    """What one decode step attends to."""

    rows: torch.Tensor
    """int32 [B, KV, R], token positions attended exactly; -1 fills unused places, which may be anywhere."""
    residual: torch.Tensor | None
    """float32 [B, H, P], log of the summed exp(proxy score) of the page's unattended candidates; -inf where none."""
    residual_factor: torch.Tensor | None = None
    """float32 [B, H, P, value_rank], mean of the leading columns of their key factors, weighted by exp(proxy score);
    0 where none. For `residual: "linear"` only."""


def candidate_range(seq_lens: torch.Tensor, config: LRQKConfig) -> tuple[int, torch.Tensor]:
    """First candidate and, int64 [B], the end of the candidates: sealed tokens that are neither sink nor recent.

    A page that the current token fills counts as sealed from the next step on.
    """
    sealed = (seq_lens.long() - 1).clamp_min(0) // config.page_size * config.page_size
    return config.sink_tokens, torch.minimum(sealed, (seq_lens.long() - config.recent_tokens).clamp_min(0))


def proxy_scores(query: torch.Tensor, factors: FactorPages, block_table: torch.Tensor, scale: float) -> torch.Tensor:
    """Scores s~ of every token of the given pages.

    Args:
        query: [B, H, d].
        block_table: int [B, P], page ids; any valid id where a request has fewer pages.

    Returns:
        float32 [B, H, P, N].
    """
    kv_heads = factors.raw.shape[1]
    pages = block_table.long()
    grouped = query.float().unflatten(1, (kv_heads, -1)) * scale  # [B, KV, G, d]
    projected = torch.einsum("bkgd,bpkrd->bpkgr", grouped, factors.projection[pages].float())
    projected = projected * factors.scale[pages][:, :, :, None, :]
    scores = projected @ factors.key_factor(pages).float().mT  # [B, P, KV, G, N]
    return scores.permute(0, 2, 3, 1, 4).flatten(1, 2)


def select(
    query: torch.Tensor,
    factors: FactorPages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    config: LRQKConfig,
) -> Selection:
    """Choose the rows of one decode step; `seq_lens` [B] counts the current token.

    Always attended: sink tokens, the last `recent_tokens`, tokens of the unsealed page. Of the others,
    the candidates, the top_k by the group's summed softmax weight of the proxy scores, as far as top_p goes.
    """
    n, kv_heads = config.page_size, factors.raw.shape[1]
    first, end = candidate_range(seq_lens, config)
    always = _always_rows(seq_lens, end, config)[:, None].expand(-1, kv_heads, -1)
    longest = int(end.max())
    if longest <= first:
        return Selection(always.int(), None)
    num_pages = -(-longest // n)
    scores = proxy_scores(query, factors, block_table[:, :num_pages], scale)  # [B, H, P, N]
    position = torch.arange(num_pages * n, device=query.device)
    is_candidate = (position >= first) & (position < end[:, None])  # [B, P*N]
    scores = scores.flatten(2).masked_fill(~is_candidate[:, None], -torch.inf)  # [B, H, P*N]
    # A request without candidates has -inf everywhere; its softmax is replaced by zeros.
    weight = scores.softmax(-1).nan_to_num(0.0).unflatten(1, (kv_heads, -1)).sum(2)  # [B, KV, P*N]
    weight = weight.masked_fill(~is_candidate[:, None], -1.0)
    group = scores.shape[1] // kv_heads
    tokens, is_selected = heaviest(weight, group, config)
    rows = torch.where(is_selected, tokens, -1)
    residual = residual_factor = None
    if config.residual != "none":
        chosen = torch.zeros_like(weight, dtype=torch.bool).scatter_(-1, tokens, is_selected)
        left = scores.masked_fill(chosen.repeat_interleave(group, 1), -torch.inf).unflatten(-1, (num_pages, n))
        residual = left.logsumexp(-1)
        if config.residual == "linear":
            residual_factor = mean_factors(left, residual, factors, block_table[:, :num_pages].long())
    return Selection(torch.cat([rows, always], -1).int(), residual, residual_factor)


def mean_factors(left: torch.Tensor, residual: torch.Tensor, factors: FactorPages, pages: torch.Tensor) -> torch.Tensor:
    """`Selection.residual_factor`.

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


def heaviest(weight: torch.Tensor, group: int, config: LRQKConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k candidates by weight, and which of them are selected.

    With top_p < 1 a candidate is selected while those before it (heavier ones, or earlier ones of equal weight)
    carry less than top_p of the weight of all candidates, which is `group`: each head's softmax sums to 1.

    Args:
        weight: float32 [B, KV, T], a group's summed softmax weights; -1 where a token is no candidate.
        group: query heads per KV head.

    Returns:
        int64 and bool [B, KV, min(top_k, T)], token positions in any order.
    """
    places = min(config.top_k, weight.shape[-1])
    if config.top_p == 1:
        top = weight.topk(places, dim=-1, sorted=False)
        return top.indices, top.values >= 0
    values, tokens = (x[..., :places] for x in weight.sort(dim=-1, descending=True, stable=True))
    before = values.clamp_min(0).cumsum(-1) - values
    return tokens, (values >= 0) & (before < config.top_p * group)


def _always_rows(seq_lens: torch.Tensor, end: torch.Tensor, config: LRQKConfig) -> torch.Tensor:
    """int64 [B, sink + tail]: positions of the rows that every step attends, -1 where there is none."""
    width = config.recent_tokens + config.page_size
    device = seq_lens.device
    tail = end.clamp_min(config.sink_tokens)[:, None] + torch.arange(width, device=device)
    sink = torch.arange(config.sink_tokens, device=device).expand(len(seq_lens), -1)
    rows = torch.cat([sink, tail], 1)
    return torch.where(rows < seq_lens[:, None], rows, -1)
