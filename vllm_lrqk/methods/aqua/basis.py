"""AQUA's basis of a layer: one rotation of queries and keys per KV head (G S et al., 2025, arXiv 2509.11155).

Offline, D stacks the queries of a KV head's group and its keys after RoPE, D = U S V', and P = V. Online q^ = q P and
k^ = k P, so that q . k = q^ . k^ while the leading columns of P carry most of it. Only D'D = Q'Q + K'K is needed:
P holds its eigenvectors.

Not in the paper: k^ = (k - mean) P, with the calibration's mean key. That takes q . mean from all scores of a query,
which softmax does not see. Keys have a large common part, which would cost the others their precision, and whose
dimensions would seem to matter.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Basis:
    """The leading columns of P, and how large projected keys are along them."""

    projection: torch.Tensor
    """P, float32 [kv_heads, head_size, stored], orthonormal columns by falling eigenvalue."""
    offset: torch.Tensor
    """mean P, float32 [kv_heads, stored]"""
    sigma: torch.Tensor
    """float32 [kv_heads, stored], standard deviation of the calibration's k^; not in the paper."""

    @property
    def stored(self) -> int:
        return self.projection.shape[-1]

    def to(self, device: torch.device) -> "Basis":
        return Basis(self.projection.to(device), self.offset.to(device), self.sigma.to(device))

    def project_key(self, key: torch.Tensor) -> torch.Tensor:
        """k^ of keys [T, kv_heads, d]: float32 [T, kv_heads, stored]."""
        return self.project_query(key) - self.offset

    def project_query(self, query: torch.Tensor) -> torch.Tensor:
        """q^ of queries [T, heads, d], in the basis of their KV heads: float32 [T, heads, stored]."""
        kv_heads = self.projection.shape[0]
        grouped = query.float().unflatten(1, (kv_heads, -1))  # [T, KV, G, d]
        projected = grouped.permute(1, 2, 0, 3).flatten(1, 2) @ self.projection  # [KV, G T, s]
        return projected.unflatten(1, (-1, len(query))).permute(2, 0, 1, 3).flatten(1, 2)


def make_basis(gram_query: torch.Tensor, gram_key: torch.Tensor, key_mean: torch.Tensor, stored: int) -> Basis:
    """The basis of one layer.

    Args:
        gram_query: [kv_heads, d, d], Q'Q over the queries of each KV head's group, divided by the number of tokens.
        gram_key: [kv_heads, d, d], K'K divided by the number of tokens.
        key_mean: [kv_heads, d].
    """
    gram_key, mean = gram_key.double(), key_mean.double()
    _, vectors = torch.linalg.eigh(gram_query.double() + gram_key)
    leading = vectors.flip(-1)[..., :stored]
    offset = (mean[:, None] @ leading)[:, 0]
    variance = (((gram_key @ leading) * leading).sum(-2) - offset.square()).clamp_min(0)
    # int8 keys are divided by sigma: a dimension without any energy gets the least that still divides.
    least = variance.amax(-1, keepdim=True).clamp_min(1e-12) * 1e-8
    return Basis(leading.float().contiguous(), offset.float(), variance.clamp_min(least).sqrt().float())
