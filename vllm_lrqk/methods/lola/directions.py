"""Directions of keys and queries along which the slope state follows the values.

Without a calibration they are coordinates: the dimensions that RoPE turns slowest, which do not average out over the
positions that are folded together. With one, (query directions q) . (key directions k) is the best product of rank r
for q . (k - mean), over the calibration's queries and keys taken as independent: the singular vectors of G^1/2 S^1/2,
G the second moment of the queries of a group, S the covariance of the keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

LEAST_ENERGY = 1e-8
"""Of a dimension, as a share of the largest: what lies below is rounding."""


_INTERLEAVED = ("cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "gptj")
"""Types of models whose RoPE turns neighbouring dimensions."""


@dataclass(frozen=True)
class Rotary:
    """Which dimensions RoPE turns: the first `size`, in pairs from the fastest to the slowest."""

    size: int
    is_interleaved: bool = False
    """Dimension 2 i is turned with 2 i + 1 (GPT-J); else i with i + size / 2 (GPT-NeoX, Llama)."""

    @classmethod
    def of(cls, config: Mapping[str, Any], head_size: int) -> "Rotary":
        """From a model's configuration, as transformers writes it."""
        parameters = config.get("rope_parameters") or {}
        share = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
        size = config.get("rotary_dim") or int(head_size * share)
        return cls(min(size, head_size), config.get("model_type") in _INTERLEAVED)


@dataclass(frozen=True)
class Directions:
    """Of one layer: float32 [KV, r, d] each."""

    query: torch.Tensor
    key: torch.Tensor

    def to(self, device: torch.device) -> "Directions":
        return Directions(self.query.to(device), self.key.to(device))


def slow_directions(num_kv_heads: int, head_size: int, rank: int, rotary: Rotary) -> Directions:
    """The coordinates that RoPE turns slowest, the same for every head; those that it leaves alone come first."""
    half = rotary.size // 2
    still = list(range(rotary.size, head_size))
    pairs = [(2 * i, 2 * i + 1) if rotary.is_interleaved else (i, i + half) for i in reversed(range(half))]
    slowest = [*still, *(dimension for pair in pairs for dimension in pair)][:rank]
    rows = torch.eye(head_size)[slowest].expand(num_kv_heads, -1, -1).contiguous()
    return Directions(rows, rows)


def calibrated_directions(
    gram_query: torch.Tensor, gram_key: torch.Tensor, key_mean: torch.Tensor, rank: int
) -> Directions:
    """Directions of one layer from a calibration's moments.

    Args:
        gram_query: [KV, d, d], Q'Q over the queries of each KV head's group, divided by the number of tokens.
        gram_key: [KV, d, d], K'K divided by the number of tokens.
        key_mean: [KV, d].
    """
    mean = key_mean.double()
    query_root, query_inverse = _roots(gram_query.double())
    key_root, key_inverse = _roots(gram_key.double() - mean[:, :, None] * mean[:, None])
    left, values, right = torch.linalg.svd(query_root @ key_root)
    share = values[:, None, :rank].sqrt()  # shared out, so that neither side is large

    def rows(columns: torch.Tensor) -> torch.Tensor:
        return columns.mT.float().contiguous()

    query = rows(query_inverse @ (left[..., :rank] * share))
    return Directions(query, rows(key_inverse @ (right.mT[..., :rank] * share)))


def _roots(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Square root of positive semi-definite matrices and its inverse, away from what carries no energy."""
    values, vectors = torch.linalg.eigh(matrix)
    least = values.amax(-1, keepdim=True).clamp_min(1e-30) * LEAST_ENERGY
    values = values.clamp_min(least)
    root, inverse = (vectors * power[:, None] @ vectors.mT for power in (values.sqrt(), values.rsqrt()))
    return root, inverse
