"""Directions of keys and queries along which the slope state follows the values.

Without a calibration both are the same r pseudo-random orthonormal vectors, for every layer and head. With one,
(query directions q) . (key directions k) is the best product of rank r for q . (k - mean), over the calibration's
queries and keys taken as independent: the singular vectors of G^1/2 S^1/2, G the second moment of the queries of a
group, S the covariance of the keys.
"""

from dataclasses import dataclass

import torch

SEED = 20505
LEAST_ENERGY = 1e-8
"""Of a dimension, as a share of the largest: what lies below is rounding."""


@dataclass(frozen=True)
class Directions:
    """Of one layer: float32 [KV, r, d] each."""

    query: torch.Tensor
    key: torch.Tensor

    def to(self, device: torch.device) -> "Directions":
        return Directions(self.query.to(device), self.key.to(device))


def random_directions(num_kv_heads: int, head_size: int, rank: int) -> Directions:
    """Fixed orthonormal directions: a function of head size and rank alone."""
    generator = torch.Generator().manual_seed(SEED)
    normal = torch.randn(head_size, rank, generator=generator, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(normal)
    basis = (basis * triangle.diagonal().sign()).float()  # QR leaves the signs open
    expanded = basis.mT.expand(num_kv_heads, -1, -1).contiguous()
    return Directions(expanded, expanded)


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
