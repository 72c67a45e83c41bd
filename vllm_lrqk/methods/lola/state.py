"""What stands for the tokens that are in neither window nor cache, in plain float32 torch.

A state has a constant number of sums per head (`format.py` names them). n tokens have been folded into it:

    fold(sums, key, value, folded)         takes more tokens in; `folded` is n before
    read(sums, query, folded, highest)     log of the tokens' summed exp(score), and their weighted mean value
    recall(sums, key, folded)              the value that the state gives to a key: its error tells who must stay exact

Shapes: K heads of the memory, G query heads per head, T queries, N tokens, d head size. Sums are float32 [K, ...].
"""

from typing import Protocol

import torch

from vllm_lrqk.methods.lola.directions import Directions
from vllm_lrqk.methods.lola.feature_maps import FeatureMaps

RIDGE = 0.05
"""Of the regression of values on keys: share of the mean variance along the directions."""
LEAST_VARIANCE = 1e-9
"""Added to it, so that equal keys have a regression."""
LEAST_FEATURE = 1e-12
"""No feature is smaller (as LoLCATs has it)."""

Sums = dict[str, torch.Tensor]


class State(Protocol):
    """See the top of this file. `read` and `recall` are not asked while nothing is folded."""

    def fold(self, sums: Sums, key: torch.Tensor, value: torch.Tensor, folded: int) -> None:
        """key, value: float32 [K, N, d]."""

    def read(
        self, sums: Sums, query: torch.Tensor, folded: int, highest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query: float32 [K, G, T, d]; highest: [K, G, T], the largest score in window and cache.
        Gives [K, G, T] and [K, G, T, d]."""

    def recall(self, sums: Sums, key: torch.Tensor, folded: int) -> torch.Tensor:
        """key: float32 [K, N, d]; gives [K, N, d]."""


class NoState:
    """Folded tokens are lost."""

    def fold(self, sums: Sums, key: torch.Tensor, value: torch.Tensor, folded: int) -> None: ...

    def read(
        self, sums: Sums, query: torch.Tensor, folded: int, highest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full_like(highest, -torch.inf), torch.zeros_like(query)

    def recall(self, sums: Sums, key: torch.Tensor, folded: int) -> torch.Tensor:
        return torch.zeros_like(key)


class SlopeState:
    """Number, means and the first order of exp around them, along r directions of the keys.

        sum_i exp(q.k_i c) v_i ~ n exp(q.kbar c) (vbar + C'(Pq q) c),   C = 1/n sum_i (z_i - zbar)(v_i - vbar)'

    with z = Pk k and c the scale of the scores. Recall is the regression of v on z: vbar + C'(S + rho)^-1 (z - zbar),
    S the second moment of z and rho `RIDGE` times its mean diagonal. The moments are kept centred and are joined as
    Chan, Golub and LeVeque (1979) do, so that they stay exact when n is large.
    """

    def __init__(self, directions: Directions, scale: float) -> None:
        self.directions = directions
        self.scale = scale

    def fold(self, sums: Sums, key: torch.Tensor, value: torch.Tensor, folded: int) -> None:
        count = key.shape[1]
        key_mean, value_mean = key.mean(1, keepdim=True), value.mean(1, keepdim=True)
        projected = (key - key_mean) @ self.directions.key.mT  # [K, N, r]
        cross, second = projected.mT @ (value - value_mean), projected.mT @ projected
        if folded == 0:
            new = {"key_mean": key_mean[:, 0], "value_mean": value_mean[:, 0], "cross_moment": cross}
            for name, tensor in (new | {"second_moment": second}).items():
                sums[name].copy_(tensor)
            return
        share = count / (folded + count)
        key_step = key_mean - sums["key_mean"][:, None]
        value_step = value_mean - sums["value_mean"][:, None]
        projected_step = key_step @ self.directions.key.mT
        weight = folded * share
        sums["cross_moment"] += cross + weight * projected_step.mT @ value_step
        sums["second_moment"] += second + weight * projected_step.mT @ projected_step
        sums["key_mean"] += share * key_step[:, 0]
        sums["value_mean"] += share * value_step[:, 0]

    def read(
        self, sums: Sums, query: torch.Tensor, folded: int, highest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = query * self.scale
        log_mass = (scaled @ sums["key_mean"][:, None, :, None])[..., 0] + torch.tensor(float(folded)).log()
        slope = sums["cross_moment"][:, None] / folded
        return log_mass, sums["value_mean"][:, None, None] + scaled @ self.directions.query[:, None].mT @ slope

    def recall(self, sums: Sums, key: torch.Tensor, folded: int) -> torch.Tensor:
        second = sums["second_moment"] / folded
        ridge = RIDGE * second.diagonal(dim1=-2, dim2=-1).mean(-1) + LEAST_VARIANCE
        second = second + ridge[:, None, None] * torch.eye(second.shape[-1], device=key.device)
        regression = torch.cholesky_solve(sums["cross_moment"] / folded, torch.linalg.cholesky(second))
        projected = (key - sums["key_mean"][:, None]) @ self.directions.key.mT
        return sums["value_mean"][:, None] + projected @ regression


class HedgehogState:
    """Linear attention with learned positive feature maps, as LoLCATs (arXiv 2410.10254) trains them.

    sum_i exp(s_i) v_i ~ exp(c(q)) phi_q(q)'H,  H = sum_i phi_k(k_i) v_i', and the mass with s = sum_i phi_k(k_i).
    """

    def __init__(self, maps: FeatureMaps) -> None:
        self.maps = maps

    def fold(self, sums: Sums, key: torch.Tensor, value: torch.Tensor, folded: int) -> None:
        features = hedgehog_features(key, self.maps.key)
        for name, tensor in (("feature_values", features.mT @ value), ("feature_sum", features.sum(1))):
            if folded == 0:
                sums[name].copy_(tensor)
            else:
                sums[name] += tensor

    def read(
        self, sums: Sums, query: torch.Tensor, folded: int, highest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        heads, group = query.shape[:2]
        features = hedgehog_features(query, self.maps.query.unflatten(0, (heads, group)))
        mass = features @ sums["feature_sum"][:, None, :, None]  # [K, G, T, 1]
        balance = highest + self.maps.bias.view(heads, group, 1)
        if self.maps.kappa is not None:
            kappa = self.maps.kappa.view(heads, group, -1, 1)
            balance = (query @ kappa)[..., 0] + self.maps.bias.view(heads, group, 1)
        return mass[..., 0].log() + balance, features @ sums["feature_values"][:, None] / mass

    def recall(self, sums: Sums, key: torch.Tensor, folded: int) -> torch.Tensor:
        features = hedgehog_features(key, self.maps.key)
        return features @ sums["feature_values"] / (features @ sums["feature_sum"][..., None])


def hedgehog_features(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Hedgehog features (arXiv 2402.04347): softmax over the dimensions of y and of -y, y = x W.

    Args:
        x: float32 [..., N, d].
        weight: float32 [..., d, f].

    Returns:
        float32 [..., N, 2 f], positive.
    """
    y = x @ weight
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp_min(LEAST_FEATURE)
