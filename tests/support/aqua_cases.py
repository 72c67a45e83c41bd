"""A layer of AQUA with requests of given lengths, in memory that is NaN until written, and dense attention."""

from itertools import accumulate

import torch

from vllm_lrqk.core.step import build_step
from vllm_lrqk.methods.aqua.basis import Basis, make_basis
from vllm_lrqk.methods.aqua.format import BlockFormat, Blocks
from vllm_lrqk.methods.aqua.kernels import TORCH, Kernels
from vllm_lrqk.methods.aqua.layer import AquaLayer
from vllm_lrqk.methods.aqua.settings import AquaSettings

UNWRITTEN = 0xFF
"""Byte that is NaN in every floating-point type."""


def anisotropic(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """Normal vectors whose coordinates fall off in size, as projections of real queries and keys do."""
    return torch.randn(*shape, generator=generator) * torch.arange(1, shape[-1] + 1) ** -0.5


def basis_of(query: torch.Tensor, key: torch.Tensor, stored: int) -> Basis:
    """The basis that queries [T, H, d] and keys [T, KV, d] give themselves."""
    grouped = query.double().unflatten(1, (key.shape[1], -1)).permute(1, 0, 2, 3).flatten(1, 2)
    keys = key.double().transpose(0, 1)
    return make_basis(grouped.mT @ grouped / len(query), keys.mT @ keys / len(query), keys.mean(1), stored)


class Requests:
    """Random requests, served step by step.

    Args:
        lengths: tokens of each request.
    """

    def __init__(
        self,
        lengths: list[int],
        config: AquaSettings,
        block_size: int = 16,
        kv_heads: int = 2,
        group: int = 3,
        d: int = 32,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        kernels: Kernels | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        counts = [-(-length // block_size) for length in lengths]
        ids = torch.randperm(sum(counts) + 2, generator=generator)  # two blocks that nobody uses
        self.lengths, self.block_size, self.scale = lengths, block_size, d**-0.5
        self.tables = list(ids[: sum(counts)].int().split(counts))
        self.unused = int(ids[-1])
        rotation = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]

        def draw(heads: int, size: float) -> list[torch.Tensor]:
            common = anisotropic(heads, d, generator=generator)  # a mean that all tokens share
            return [
                (size * (anisotropic(n, heads, d, generator=generator) + common) @ rotation).to(dtype) for n in lengths
            ]

        self.query, self.key = draw(kv_heads * group, 4.0), draw(kv_heads, 4.0)
        self.value = [torch.randn(n, kv_heads, d, generator=generator).to(dtype) for n in lengths]
        form = BlockFormat.from_config(config, block_size, d, dtype)
        raw = torch.full((len(ids), kv_heads, form.block_bytes), UNWRITTEN, dtype=torch.uint8)
        basis = basis_of(torch.cat(self.query), torch.cat(self.key), form.stored)
        self.layer = AquaLayer(Blocks(raw, form), basis, self.scale, config, kernels or TORCH)

    def run(self, decodes: list[tuple[int, int]], chunks: list[tuple[int, int, int]], padding: int = 0) -> torch.Tensor:
        """One step; the outputs of its tokens, [T, H, d].

        Args:
            decodes: request and position of its token.
            chunks: request, first and past-the-last position.
            padding: tokens after the step's own, whose rows are NaN.
        """
        parts = [(r, i, i + 1) for r, i in decodes] + chunks
        width = max(len(table) for table in self.tables)
        table = torch.full((len(parts), width), self.unused, dtype=torch.int32)
        slots = []
        for row, (r, first, end) in enumerate(parts):
            table[row, : len(self.tables[r])] = self.tables[r]
            position = torch.arange(first, end)
            slots.append(self.tables[r][position // self.block_size] * self.block_size + position % self.block_size)
        slots.append(torch.full((padding,), -1))
        starts, lens = [0, *accumulate(end - first for _, first, end in parts)], [end for _, _, end in parts]

        def rows(of: list[torch.Tensor]) -> torch.Tensor:
            tokens = torch.cat([of[r][first:end] for r, first, end in parts])
            return torch.cat([tokens, torch.full((padding, *tokens.shape[1:]), torch.nan, dtype=tokens.dtype)])

        query = rows(self.query)
        output = torch.full_like(query, torch.nan)
        step = build_step(starts, lens, table, torch.tensor(lens).int(), torch.cat(slots).long(), self.block_size)
        step.slot_mapping = torch.cat(slots).long()  # with the padding's
        self.layer.forward(query, rows(self.key), rows(self.value), step, None, output)
        return output[: starts[-1]]

    def dense(self, r: int, first: int, end: int) -> torch.Tensor:
        """Dense attention of a request's tokens in float64: [end - first, H, d]."""
        query, key, value = (x[r].double().transpose(0, 1) for x in (self.query, self.key, self.value))
        group = len(query) // len(key)
        key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
        scores = query[:, first:end] @ key.mT * self.scale
        position = torch.arange(key.shape[1])
        scores = scores.masked_fill(position > torch.arange(first, end)[:, None], -torch.inf)
        return (scores.softmax(-1) @ value).transpose(0, 1)
