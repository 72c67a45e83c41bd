"""One attention layer's queries, keys and values."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class QKV:
    """One layer's sequence after RoPE; tokens from `prompt_tokens` on are decoded one by one.

    Scores are q . k / sqrt(d): a layer with another scale has it in its queries.
    """

    query: torch.Tensor
    """[L, H, d]; query head h uses KV head h // (H / KV)."""
    key: torch.Tensor
    """[L, KV, d]"""
    value: torch.Tensor
    """[L, KV, d]"""
    prompt_tokens: int

    @property
    def decode_tokens(self) -> int:
        return len(self.query) - self.prompt_tokens
