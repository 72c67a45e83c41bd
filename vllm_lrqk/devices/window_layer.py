"""One attention layer with a sliding window, served exactly where device and host memory are the same."""

import torch

from vllm_lrqk.core import host_pages
from vllm_lrqk.core.layer import LayerShape
from vllm_lrqk.core.logits import PLAIN, Logits
from vllm_lrqk.core.step import Step
from vllm_lrqk.devices import cpu


class WindowLayer:
    """Appends and attends.

    Args:
        window: tokens that a query attends to, its own included.
        names: of instruction sets, as `cpu.instruction_sets`; none: the plain torch forms.
    """

    logits: Logits = PLAIN
    """As of `Layer`."""

    def __init__(self, shape: LayerShape, window: int, names: tuple[str, ...]) -> None:
        self.shape, self.window, self.names = shape, window, names

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
        names, scale = self.names, self.shape.scale
        rows = blocks.view(torch.uint8).view(self.shape.torch_dtype).unflatten(-1, (2, self.shape.head_size))
        if names:
            cpu.append_rows(names, key, value, rows, step.slot_mapping)
        else:
            host_pages.append_rows(key, value, rows, step.slot_mapping)
        for chunk in step.prefill:
            of, place = chunk.tokens, (chunk.pages, chunk.context_len, self.window)
            cpu.window_prefill(names, query[of], key[of], value[of], rows, *place, scale, output[of], self.logits)
        if step.num_decodes:
            (part,) = step.decoding(one_per_request=False)
            of, answer = part.tokens, torch.empty_like(output[part.tokens])
            requests = part.block_table, part.seq_lens
            cpu.window_decode(names, query[of], rows, *requests, self.window, scale, answer, self.logits)
            output[of] = answer
