"""One attention layer of AQUA, and its part of a forward step."""

from typing import Protocol

import torch

from vllm_lrqk.methods.aqua.basis import Basis
from vllm_lrqk.methods.aqua.format import Blocks
from vllm_lrqk.methods.aqua.kernels import Kernels, kernels_for
from vllm_lrqk.methods.aqua.settings import AquaConfig


class Chunk(Protocol):
    """Several tokens of one request, `start` to `end` - 1 of the step, after `context_len` others of the request."""

    start: int
    end: int
    context_len: int
    pages: torch.Tensor
    """int32 [P], the request's block ids in order."""


class Step(Protocol):
    """What AQUA reads of a forward step: tokens of decode requests first, one each."""

    num_decodes: int
    seq_lens: torch.Tensor
    """int32 [R], tokens of each request, this step's included."""
    block_table: torch.Tensor
    """int32 [R, P]"""
    slot_mapping: torch.Tensor
    """int64 [T], block id * block size + offset, -1 for padding."""
    prefill: list


class AquaLayer:
    """Blocks and basis of one layer.

    Args:
        scale: factor of the attention scores.
    """

    def __init__(
        self, blocks: Blocks, basis: Basis, scale: float, config: AquaConfig, kernels: Kernels | None = None
    ) -> None:
        self.blocks = blocks
        self.basis = basis
        self.scale = scale
        self.config = config
        self.kernels = kernels or kernels_for(blocks.raw.device)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Step, output: torch.Tensor
    ) -> None:
        """Store the step's keys and values, and attend.

        Args:
            query, output: [T, H, d].
            key, value: [T, KV, d].
        """
        self.kernels.append(key, value, self.blocks, self.basis, step.slot_mapping)
        for chunk in step.prefill:
            tokens = slice(chunk.start, chunk.end)
            self.kernels.prefill_attention(
                query[tokens],
                self.blocks,
                self.basis,
                chunk.pages,
                chunk.context_len,
                self.scale,
                output[tokens],
            )
        count = step.num_decodes
        if count:
            self.kernels.decode_attention(
                query[:count],
                self.blocks,
                self.basis,
                step.block_table[:count],
                step.seq_lens[:count],
                self.scale,
                self.config,
                output[:count],
            )
