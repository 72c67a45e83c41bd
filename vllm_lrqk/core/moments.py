"""Second moments of a layer's queries, keys and values, summed while a model runs: what calibrated bases are made of.

Shapes: T tokens, H query heads, KV kv heads, d head size, N tokens of a page.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch

from vllm_lrqk.core.rotary import RotaryTable

EARLIER_PAGES = 16
"""Frames in which each query is counted, at most: those of this many pages, evenly spaced from the first to its own."""


@dataclass(frozen=True)
class Moments:
    """Means over tokens, float32 [KV, d, d] but for `key_mean`; queries are summed over the query heads of a KV head.

    A "page frame" is the frame (see `core/rotary.py`) of the first position of a page of N tokens.
    """

    query: torch.Tensor
    """q q', after RoPE."""
    key: torch.Tensor
    """k k', after RoPE."""
    key_mean: torch.Tensor
    """k, after RoPE: [KV, d]."""
    page_query: torch.Tensor
    """q q' in the frames of pages that begin before the query."""
    page_key: torch.Tensor
    """k k' in the frame of the key's page."""
    page_key_deviation: torch.Tensor
    """(k - mean)(k - mean)' in the frame of the key's page, with the page's mean key."""
    page_value_key: torch.Tensor
    """(v - mean)(k - mean)', likewise."""

    def heads(self, heads: slice) -> "Moments":
        """Those of some KV heads."""
        return Moments(*(tensor[heads] for tensor in vars(self).values()))


class MomentSums:
    """Running sums for `Moments` of one layer. Products are float32, sums float64.

    Args:
        rotary: of the model, or None where queries and keys cannot be rotated back; page frames are then left out.
        page_size: N.
    """

    def __init__(
        self, kv_heads: int, head_size: int, page_size: int, rotary: RotaryTable | None, device: torch.device
    ) -> None:
        self.page_size, self.rotary = page_size, rotary
        names = list(Moments.__dataclass_fields__)
        square = (kv_heads, head_size, head_size)
        self._sums = {name: torch.zeros(square, dtype=torch.float64, device=device) for name in names}
        self._sums["key_mean"] = self._sums["key_mean"][..., 0]
        self._weights = dict.fromkeys(names, 0.0)

    def add(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor) -> None:
        """Count the tokens of one step.

        Args:
            query: [T, H, d].
            key, value: [T, KV, d].
            positions: int64 [T]; tokens of one request follow each other.
        """
        queries = query.float().unflatten(1, (key.shape[1], -1)).transpose(0, 1)  # [KV, T, G, d]
        keys, values = key.float().transpose(0, 1), value.float().transpose(0, 1)  # [KV, T, d]
        self._add("query", queries.flatten(1, 2), queries.flatten(1, 2), len(query))
        self._add("key", keys, keys, len(query))
        self._sums["key_mean"] += keys.sum(1)
        self._weights["key_mean"] += len(query)
        if self.rotary is None:
            return
        for start, end in self._page_pieces(positions):
            first = int(positions[start])
            page = first // self.page_size
            page_start = page * self.page_size
            self._add_queries(self.rotary.rotate(queries[:, start:end], page_start, backwards=True), page)
            piece = self.rotary.rotate(keys[:, start:end], page_start, backwards=True)
            self._add("page_key", piece, piece, end - start)
            if end - start == self.page_size:
                piece, of_values = (x - x.mean(1, keepdim=True) for x in (piece, values[:, start:end]))
                self._add("page_key_deviation", piece, piece, end - start)
                self._add("page_value_key", of_values, piece, end - start)

    def sums(self) -> dict[str, tuple[torch.Tensor, float]]:
        """Sums, float64 on the CPU, and what to divide them by, by the names of `Moments`."""
        return {name: (total.cpu(), self._weights[name]) for name, total in self._sums.items()}

    def _add(self, name: str, left: torch.Tensor, right: torch.Tensor, weight: float) -> None:
        """Count left' right of [KV, n, d] each."""
        self._sums[name] += left.mT @ right
        self._weights[name] += weight

    def _add_queries(self, queries: torch.Tensor, page: int) -> None:
        """Count queries [KV, n, G, d], given in the frame of the page they stand in, in the frames of earlier pages."""
        assert self.rotary is not None
        rows = queries.flatten(1, 2)
        gram = rows.mT @ rows
        distances = torch.linspace(0, page, min(page + 1, EARLIER_PAGES)).round().long().tolist()
        for distance in distances:
            half = self.rotary.rotate(gram, distance * self.page_size)
            turned = self.rotary.rotate(half.mT, distance * self.page_size)
            self._sums["page_query"] += turned * ((page + 1) / len(distances))
        self._weights["page_query"] += queries.shape[1] * (page + 1)

    def _page_pieces(self, positions: torch.Tensor) -> list[tuple[int, int]]:
        """Ranges of tokens that follow each other and lie in one page."""
        positions = positions.cpu()
        pages = positions // self.page_size
        is_new = (positions.diff() != 1) | (pages.diff() != 0)
        edges = [0, *(is_new.nonzero()[:, 0] + 1).tolist(), len(positions)]
        return list(pairwise(edges))


def mean_moments(ranks: list[dict[str, tuple[torch.Tensor, float]]], kv_heads: int) -> Moments:
    """The moments of a layer from the sums of all ranks of a tensor-parallel group, in the order of the ranks.

    Args:
        kv_heads: of the whole layer. Where that is less than all ranks' together, neighbouring ranks have the same
            KV head, and each a part of its query heads.
    """
    found = {}
    for name in Moments.__dataclass_fields__:
        sums = torch.cat([rank[name][0] for rank in ranks])
        copies = len(sums) // kv_heads
        shared = sums.unflatten(0, (kv_heads, copies))
        sums = shared.sum(1) if "query" in name else shared[:, 0]
        found[name] = (sums / max(ranks[0][name][1], 1.0)).float()
    return Moments(**found)
