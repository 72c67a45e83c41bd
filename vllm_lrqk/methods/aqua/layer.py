"""One attention layer of AQUA."""

import torch

from vllm_lrqk.core.layer import Layer
from vllm_lrqk.core.step import PrefillChunk, Step
from vllm_lrqk.devices.cpu import hint_for
from vllm_lrqk.methods.aqua.basis import Basis
from vllm_lrqk.methods.aqua.cpu import served_name
from vllm_lrqk.methods.aqua.format import Blocks
from vllm_lrqk.methods.aqua.kernels import Kernels
from vllm_lrqk.methods.aqua.settings import AquaSettings


class AquaLayer(Layer):
    """Blocks and basis of one layer.

    Args:
        scale: factor of the attention scores.
    """

    def __init__(self, blocks: Blocks, basis: Basis, scale: float, config: AquaSettings, kernels: Kernels) -> None:
        self.blocks = blocks
        self.basis = basis
        self.scale = scale
        self.config = config
        self.kernels = kernels
        self.kernels_name = served_name(kernels.name, blocks.format)
        self.kernels_hint = hint_for(kernels.name, self.kernels_name, blocks.format.head_size)

    def append(self, key: torch.Tensor, value: torch.Tensor, step: Step) -> None:
        self.kernels.append(key, value, self.blocks, self.basis, step.slot_mapping)

    def prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        chunk: PrefillChunk,
        request_blocks: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        self.kernels.prefill_attention(
            query, self.blocks, self.basis, chunk.pages, chunk.context_len, self.scale, output
        )

    def decode(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        request_blocks: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        self.kernels.decode_attention(
            query, self.blocks, self.basis, block_table, seq_lens, self.scale, self.config, output
        )
