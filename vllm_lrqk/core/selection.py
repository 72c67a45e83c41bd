"""Which rows one decode step attends exactly: the rules that every scorer shares.

Shapes: B requests, H query heads, KV kv heads, P pages, T tokens.
"""

from dataclasses import dataclass
from typing import Protocol

import torch


class Budget(Protocol):
    """Settings of a selection."""

    @property
    def page_size(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def recent_tokens(self) -> int: ...
    @property
    def sink_tokens(self) -> int: ...


@dataclass
class Selection:
    """What one decode step attends to."""

    positions: torch.Tensor
    """int32 [B, KV, R], token positions attended exactly; -1 fills unused capacity, which may be anywhere."""
    residual: torch.Tensor | None
    """float32 [B, H, P], log of the summed exp(proxy score) of the page's unattended candidates; -inf where none."""
    moment: torch.Tensor | None = None
    """float32 [B, H, P, value_rank], mean of the leading columns of their key factors, weighted by exp(proxy score);
    anything where there are none. For `residual: "linear"` only."""


def candidate_range(seq_lens: torch.Tensor, budget: Budget) -> tuple[int, torch.Tensor]:
    """First candidate and, int64 [B], the end of the candidates: sealed tokens that are neither sink nor recent.

    A page that the current token fills counts as sealed from the next step on.
    """
    sealed = (seq_lens.long() - 1).clamp_min(0) // budget.page_size * budget.page_size
    return budget.sink_tokens, torch.minimum(sealed, (seq_lens.long() - budget.recent_tokens).clamp_min(0))


def heaviest(weight: torch.Tensor, group: int, budget: Budget) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k candidates by weight, of equal ones the older, and which of them are selected.

    With top_p < 1 a candidate is selected while those before it (heavier ones, or earlier ones of equal weight)
    carry less than top_p of the weight of all candidates, which is `group`: each head's softmax sums to 1.

    Args:
        weight: float32 [B, KV, T], a group's summed softmax weights; -1 where a token is no candidate.
        group: query heads per KV head.

    Returns:
        int64 and bool [B, KV, min(top_k, T)], token positions in any order.
    """
    capacity, weight = min(budget.top_k, weight.shape[-1]), weight.nan_to_num(-1.0)
    if budget.top_p == 1:
        least = weight.topk(capacity, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        is_heavier, is_tie = weight > least, weight == least
        places = capacity - is_heavier.sum(-1, keepdim=True)
        chosen = is_heavier | (is_tie & (is_tie.cumsum(-1) <= places))
        position = torch.arange(weight.shape[-1], device=weight.device).where(chosen, weight.shape[-1])
        tokens = position.topk(capacity, dim=-1, largest=False).values
        return tokens, weight.gather(-1, tokens) >= 0
    values, tokens = (x[..., :capacity] for x in weight.sort(dim=-1, descending=True, stable=True))
    before = values.clamp_min(0).cumsum(-1) - values
    return tokens, (values >= 0) & (before < budget.top_p * group)


def always_rows(seq_lens: torch.Tensor, end: torch.Tensor, budget: Budget) -> torch.Tensor:
    """Positions of the rows that every step attends, -1 where there is none: int64 [B, sink + tail].

    Args:
        end: int64 [B], of the candidates.
    """
    width = budget.recent_tokens + budget.page_size
    device = seq_lens.device
    tail = end.clamp_min(budget.sink_tokens)[:, None] + torch.arange(width, device=device)
    sink = torch.arange(budget.sink_tokens, device=device).expand(len(seq_lens), -1)
    rows = torch.cat([sink, tail], 1)
    return torch.where(rows < seq_lens[:, None], rows, -1)
