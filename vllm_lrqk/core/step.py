"""What one forward step asks of every layer, derived from what the host knows: no device is waited for.

Shapes: R requests, T tokens of the step, P pages.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise

import torch


@dataclass
class PrefillChunk:
    """Several tokens of one request, attended exactly."""

    request: int
    """Row of the batch."""
    start: int
    """First token in the step."""
    end: int
    """Past the last token in the step."""
    context_len: int
    """Tokens of the request before the chunk."""
    pages: torch.Tensor
    """int32 [P], the request's pages in order."""
    filled: range
    """Pages that the chunk fills, as indices in `pages`."""

    @property
    def tokens(self) -> slice:
        """Of the step."""
        return slice(self.start, self.end)


@dataclass
class PromptRun:
    """Chunks whose tokens follow each other in a step; of several, each begins its request, so none has a history."""

    chunks: list[PrefillChunk]

    @property
    def tokens(self) -> slice:
        """Of the step."""
        return slice(self.chunks[0].start, self.chunks[-1].end)

    @property
    def lens(self) -> list[int]:
        """Tokens of each chunk."""
        return [chunk.end - chunk.start for chunk in self.chunks]

    @cached_property
    def starts(self) -> torch.Tensor:
        """int32 [chunks + 1] on the device: first token of each chunk, counted from the run's, and the end."""
        first, device = self.chunks[0].start, self.chunks[0].pages.device
        places = [chunk.start - first for chunk in self.chunks] + [self.chunks[-1].end - first]
        return to_device([places], device)[0].int()


@dataclass
class Step:
    """One forward step; tensors are vLLM's own, whose addresses a captured graph keeps."""

    num_tokens: int
    slot_mapping: torch.Tensor
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

    @cached_property
    def prompt_runs(self) -> list[PromptRun]:
        """The prefill chunks: neighbours without history together, all others alone."""
        runs = []
        for has_history, group in groupby(self.prefill, key=lambda chunk: chunk.context_len > 0):
            chunks = list(group)
            runs += [PromptRun([chunk]) for chunk in chunks] if has_history else [PromptRun(chunks)]
        return runs


def prefill_chunk(request: int, start: int, end: int, length: int, pages: torch.Tensor, page_size: int) -> PrefillChunk:
    """The chunk of tokens start ... end - 1 of a step, the last of a request that has `length` tokens by then."""
    context_len = length - (end - start)
    filled = range(context_len // page_size, length // page_size)
    return PrefillChunk(request, start, end, context_len, pages, filled)


def build_step(
    query_starts: list[int],
    lens: list[int],
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    slot_mapping: torch.Tensor,
    page_size: int,
) -> Step:
    """Split a batch, in which requests with one token come first, into decode requests and prefill chunks.

    A captured step cannot tell the last token of a prompt from a generated one, so a single token always decodes.

    Args:
        query_starts: R + 1 offsets of the requests' tokens; padding requests, at the end, have none.
        lens: R lengths, what `seq_lens` holds for requests that have tokens.
        block_table, seq_lens, slot_mapping: see `Step`.
    """
    counts = [end - start for start, end in pairwise(query_starts)]
    num_decodes = next((row for row, count in enumerate(counts) if count != 1), len(counts))
    filled = [(row, lens[row] // page_size - 1) for row in range(num_decodes) if lens[row] % page_size == 0]
    prefill = [
        prefill_chunk(row, query_starts[row], query_starts[row + 1], lens[row], block_table[row], page_size)
        for row in range(num_decodes, len(counts))
        if counts[row]
    ]
    num_tokens = query_starts[-1]
    return Step(num_tokens, slot_mapping[:num_tokens], num_decodes, block_table, seq_lens, prefill, filled)


def to_device(values: list[list[int]], device: torch.device) -> torch.Tensor:
    """int64 [len(values), ...] on the device, without waiting for the copy."""
    host = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


@dataclass(frozen=True)
class FilledPages:
    """Full pages, each of another request."""

    pages: torch.Tensor
    """int64 [M], ids."""
    numbers: torch.Tensor
    """int64 [M], where in their requests they are, from 0."""


def filled_pages(step: Step) -> FilledPages | None:
    """The pages that the step's decode tokens fill, in tensors of their own; None without any."""
    if not step.filled:
        return None
    rows, indices = to_device([list(column) for column in zip(*step.filled)], step.block_table.device)
    return FilledPages(step.block_table[rows, indices].long(), indices)
