"""Dense attention of one decode step: the truth, and exact attention over chosen rows of it."""

import torch

from vllm_lrqk.evaluation.attention.qkv import QKV


class ExactStep:
    """Scores, weights and output of dense attention in float32. S below is KV or H.

    Args:
        key, value: float32 [KV, L, d], the sequence's.
        index: the token whose query attends; it and all before it are seen.
    """

    def __init__(self, qkv: QKV, key: torch.Tensor, value: torch.Tensor, index: int) -> None:
        self.index = index
        self.query = qkv.query[index].float()  # [H, d]
        self.kv_heads = key.shape[0]
        self._value = value[:, : index + 1]
        grouped = self.query.unflatten(0, (self.kv_heads, -1))
        self._scores = grouped @ key[:, : index + 1].mT * key.shape[-1] ** -0.5  # [KV, G, L]
        self.weight = self._scores.softmax(-1).flatten(0, 1)
        """Softmax weights, [H, L]."""
        self.output = (self.weight.unflatten(0, (self.kv_heads, -1)) @ self._value).flatten(0, 1)
        """[H, d]"""

    @property
    def num_tokens(self) -> int:
        return self.index + 1

    def weight_for(self, selecting_heads: int) -> torch.Tensor:
        """Weights by which S heads should select: each query head's, or summed over a KV head's group: [S, L]."""
        return self.weight.unflatten(0, (selecting_heads, -1)).sum(1)

    def per_query_head(self, rows: torch.Tensor) -> torch.Tensor:
        """bool [S, L] as [H, L]."""
        return rows.repeat_interleave(self.weight.shape[0] // rows.shape[0], 0)

    def attend(self, rows: torch.Tensor) -> torch.Tensor:
        """Exact attention over the rows bool [S, L] alone: [H, d]."""
        mask = self.per_query_head(rows).view_as(self._scores)
        weight = self._scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return (weight @ self._value).flatten(0, 1)
