"""One attention layer with a sliding window, served exactly where device and host memory are the same."""

import torch

from vllm_lrqk.core.host_pages import append_rows
from vllm_lrqk.core.layer import LayerShape
from vllm_lrqk.core.step import Step
from vllm_lrqk.core.window_attention import window_attention, window_decode


class WindowLayer:
    """Appends and attends.

    Args:
        window: tokens that a query attends to, its own included.
    """

    def __init__(self, shape: LayerShape, window: int) -> None:
        self.shape, self.window = shape, window

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        step: Step,
        blocks: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Store the step's keys and values and attend.

        Args:
            query, output: [T, H, d].
            key, value: [T, KV, d].
            blocks: [num_blocks, KV, N, bytes per token], vLLM's memory.
        """
        shape = self.shape
        rows = blocks.view(torch.uint8).view(shape.torch_dtype).unflatten(-1, (2, shape.head_size))
        append_rows(key, value, rows, step.slot_mapping)
        for chunk in step.prefill:
            of = chunk.tokens
            window_attention(query[of], rows, chunk.pages, chunk.context_len, self.window, shape.scale, output[of])
        if step.num_decodes:
            of = slice(step.num_decodes)
            table, lens = step.block_table[of], step.seq_lens[of]
            window_decode(query[of], rows, table, lens, self.window, shape.scale, output[of])
