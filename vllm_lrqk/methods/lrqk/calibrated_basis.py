"""The calibrated basis of a layer: one pair of projections per KV head for all pages, in the page's frame."""

from dataclasses import dataclass
from functools import cached_property

import torch

from vllm_lrqk.core.moments import Moments
from vllm_lrqk.core.rotary import RotaryTable

QUERY_SHARE = 0.5
"""Share of the calibration's queries in the metric; the rest is identity, as in `seal.py`."""
LEAST_EIGENVALUE = 1e-7
"""Of the largest, for square roots of moments."""
VALUE_RIDGE = 1e-4
"""Of the mean diagonal, for the value map."""

TURN = 32767
"""What 1 is in the kernels' table of cosines and sines."""
SPARE_PAGES = 16
"""At its end: kernels project a query on a few pages at once."""


@dataclass(frozen=True)
class CalibratedBasis:
    """Projections of queries and keys, and the frames of pages."""

    query: torch.Tensor
    """X, float32 [KV, d, r]: z = X' R(-p0) q"""
    key: torch.Tensor
    """Y, float32 [KV, d, r]: key factor A_n = Y' R(-p0) k_n, columns by falling contribution to the scores"""
    value: torch.Tensor
    """float32 [KV, r, d], the calibrated value map: v_n - mean follows (A_n - mean) times this."""
    frames: RotaryTable
    """Of pages: its position i is that of the first token of a request's page i."""

    @cached_property
    def kernel_tensors(self) -> list[torch.Tensor]:
        """What csrc/cpu/lrqk/args.h calls a CalibratedBasis: rows of both projections by pairs of dimensions."""
        head_size = self.query.shape[1]
        pairs, frames = self.frames.pairs(head_size), self.frames.turns(head_size)
        query, key = (x[:, pairs.long()].contiguous() for x in (self.query, self.key))
        rounded = (frames * TURN).round().to(torch.int16)
        rounded = torch.cat([rounded, rounded.new_zeros(SPARE_PAGES, *rounded.shape[1:])])
        return [query, key, self.value.contiguous(), pairs, frames, rounded.view(torch.int32)[..., 0].contiguous()]


def make_basis(moments: Moments, rank: int, frames: RotaryTable) -> CalibratedBasis:
    """The rank-r X, Y that lose least of the scores of the calibration's queries and keys.

    With G_Q = M M', G_K = L L' in the page frame (symmetric roots) and M L = U S V', the scores Q K' are nearest, in
    Frobenius norm, to Q X Y' K' with X = M^-1 U_r S_r^1/2 and Y = L^-1 V_r S_r^1/2.
    """
    d = moments.query.shape[-1]
    identity = torch.eye(d, dtype=torch.float64)
    metric = QUERY_SHARE * _normalized(moments.page_query.double()) + (1 - QUERY_SHARE) * identity
    query_root, query_inverse = _roots(metric)
    key_root, key_inverse = _roots(_normalized(moments.page_key.double()))
    left, size, right = torch.linalg.svd(query_root @ key_root)
    half = size[..., None, :rank].sqrt()
    query, key = query_inverse @ (left[..., :rank] * half), key_inverse @ (right.mT[..., :rank] * half)
    gram = key.mT @ moments.page_key_deviation.double() @ key
    ridge = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * VALUE_RIDGE
    value = torch.linalg.solve(
        gram + ridge.clamp_min(1e-30) * torch.eye(rank), (moments.page_value_key.double() @ key).mT
    )
    return CalibratedBasis(query.float(), key.float(), value.float(), frames)


def _normalized(gram: torch.Tensor) -> torch.Tensor:
    """[..., d, d] scaled to a mean diagonal of 1."""
    return gram / gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-30)


def _roots(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric square root of [..., d, d] and its inverse."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(values[..., -1:].clamp_min(1e-30) * LEAST_EIGENVALUE)
    return (vectors * values.sqrt()[..., None, :]) @ vectors.mT, (vectors * values.rsqrt()[..., None, :]) @ vectors.mT
