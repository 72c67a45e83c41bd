"""What one forward step asks of every layer on a CUDA device, derived from what the host knows: nothing is waited for.

Shapes: R requests, T tokens of the step, P pages.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch

from vllm_lrqk.core.step import PrefillChunk, prefill_chunk


@dataclass
class DeviceStep:
    """One forward step; tensors are on the device, those of vLLM itself, whose addresses a captured graph keeps."""

    num_tokens: int
    slots: torch.Tensor
    """int64 [T], page id * page size + offset of each token; -1 for padding."""
    num_decodes: int
    """The first requests have one token each, request i the token i, and take the decode path."""
    block_table: torch.Tensor
    """int32 [R, P]."""
    seq_lens: torch.Tensor
    """int32 [R], this step's tokens included; 0 for padding."""
    prefill: list[PrefillChunk]
    filled: list[tuple[int, int]]
    """Pages that the decode tokens fill: (request, index among its pages)."""


def build_device_step(
    query_starts: list[int],
    lens: list[int],
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    slots: torch.Tensor,
    page_size: int,
) -> DeviceStep:
    """Split a batch, in which requests with one token come first, into decode requests and prefill chunks.

    A captured step cannot tell the last token of a prompt from a generated one, so a single token always decodes.

    Args:
        query_starts: R + 1 offsets of the requests' tokens; padding requests, at the end, have none.
        lens: R lengths, what `seq_lens` holds for requests that have tokens.
        block_table, seq_lens, slots: see `DeviceStep`.
    """
    counts = [end - start for start, end in pairwise(query_starts)]
    num_decodes = next((row for row, count in enumerate(counts) if count != 1), len(counts))
    filled = [(row, lens[row] // page_size - 1) for row in range(num_decodes) if lens[row] % page_size == 0]
    prefill = [
        prefill_chunk(query_starts[row], query_starts[row + 1], lens[row], block_table[row], page_size)
        for row in range(num_decodes, len(counts))
        if counts[row]
    ]
    num_tokens = query_starts[-1]
    return DeviceStep(num_tokens, slots[:num_tokens], num_decodes, block_table, seq_lens, prefill, filled)


def to_device(values: list[list[int]], device: torch.device) -> torch.Tensor:
    """int64 [len(values), ...] on the device, without waiting for the copy."""
    host = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def filled_pages(step: DeviceStep) -> torch.Tensor | None:
    """Ids of the pages that the step's decode tokens fill, int64 [M] of their own; None without any."""
    if not step.filled:
        return None
    rows, indices = to_device([list(column) for column in zip(*step.filled)], step.block_table.device)
    return step.block_table[rows, indices].long()
