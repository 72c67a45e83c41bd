"""What one forward step asks of every layer, derived from what the host knows: no device is waited for.

Shapes: R requests, T tokens of the step, P pages.
"""

from dataclasses import dataclass, field
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
class DecodeTokens:
    """Tokens that decode, each as the last of its request by then; one request may have several."""

    tokens: slice | torch.Tensor
    """Of the step; a tensor is int64 [B]."""
    requests: slice | torch.Tensor
    """Rows of the batch; a tensor is int64 [B]."""
    block_table: torch.Tensor
    """int32 [B, P]."""
    seq_lens: torch.Tensor
    """int32 [B], the token itself included; 0 for padding."""


@dataclass(frozen=True)
class Span:
    """The token that one request decodes, and behind it those that were drafted for it and may be rejected."""

    request: int
    """Row of the batch."""
    start: int
    """First token in the step."""
    count: int
    length: int
    """Tokens of the request with all of these."""


@dataclass
class Step:
    """One forward step; tensors are vLLM's own, whose addresses a captured graph keeps."""

    num_tokens: int
    slot_mapping: torch.Tensor
    """int64 [T], page id * page size + offset of each token; -1 for padding."""
    num_decodes: int
    """Tokens that take the decode path: unless there are `spans`, token i of request i."""
    block_table: torch.Tensor
    """int32 [R, P]."""
    seq_lens: torch.Tensor
    """int32 [R], this step's tokens included; 0 for padding."""
    prefill: list[PrefillChunk]
    filled: list[tuple[int, int]]
    """Pages that the decode tokens fill: (request, index among its pages)."""
    passed: list[tuple[int, int]] = field(default_factory=list)
    """As `filled`, pages that a span goes on beyond: sealed in this step, before the span's next tokens decode."""
    spans: list[Span] | None = None
    """What decodes where tokens were drafted."""

    def decoding(self, one_per_request: bool) -> list[DecodeTokens]:
        """The tokens that decode: all at once, or one after the other of each request."""
        if self.spans is None:
            of = slice(self.num_decodes)
            return [DecodeTokens(of, of, self.block_table[of], self.seq_lens[of])]
        return self._turns if one_per_request else [self._all_tokens]

    @cached_property
    def _all_tokens(self) -> DecodeTokens:
        assert self.spans is not None
        return self._decode_tokens([(span, turn) for span in self.spans for turn in range(span.count)])

    @cached_property
    def _turns(self) -> list[DecodeTokens]:
        assert self.spans is not None
        longest = max(span.count for span in self.spans)
        return [
            self._decode_tokens([(span, turn) for span in self.spans if turn < span.count]) for turn in range(longest)
        ]

    def _decode_tokens(self, chosen: list[tuple[Span, int]]) -> DecodeTokens:
        tokens = [span.start + turn for span, turn in chosen]
        requests = [span.request for span, _ in chosen]
        lens = [span.length - span.count + turn + 1 for span, turn in chosen]
        places, rows, lengths = to_device([tokens, requests, lens], self.block_table.device)
        is_run = tokens == list(range(tokens[0], tokens[0] + len(tokens)))
        of = slice(tokens[0], tokens[0] + len(tokens)) if is_run else places
        return DecodeTokens(of, rows, self.block_table[rows], lengths.int())

    @cached_property
    def passed_pages(self) -> "FilledPages | None":
        """`passed`, on the device; None without any."""
        return _on_device(self.passed, self.block_table)

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
    max_decode_tokens: int = 1,
    is_prefilling: list[bool] | None = None,
) -> Step:
    """Split a batch, in which requests with one token come first, into decode requests and prefill chunks.

    A captured step cannot tell the last token of a prompt from a generated one, so a single token always decodes.
    Where tokens may have been drafted, single tokens decode in any place, and so do several of a request that is past
    its prompt.

    Args:
        query_starts: R + 1 offsets of the requests' tokens; padding requests, at the end, have none.
        lens: R lengths, what `seq_lens` holds for requests that have tokens.
        block_table, seq_lens, slot_mapping: see `Step`.
        max_decode_tokens: of a request, the drafted ones included.
        is_prefilling: whether each request is in its prompt; without drafts it does not matter.
    """
    counts = [end - start for start, end in pairwise(query_starts)]
    spans = None
    if max_decode_tokens == 1:
        decoding = list(range(next((row for row, count in enumerate(counts) if count != 1), len(counts))))
    else:
        assert is_prefilling is not None
        most = [1 if prompt else max_decode_tokens for prompt in is_prefilling]
        decoding = [row for row, count in enumerate(counts) if 1 <= count <= most[row]]
        spans = [Span(row, query_starts[row], counts[row], lens[row]) for row in decoding]
    filled = [(row, lens[row] // page_size - 1) for row in decoding if lens[row] % page_size == 0]
    passed = [
        (row, page)
        for row in decoding
        for page in range((lens[row] - counts[row]) // page_size, (lens[row] - 1) // page_size)
    ]
    prefill = [
        prefill_chunk(row, query_starts[row], query_starts[row + 1], lens[row], block_table[row], page_size)
        for row in sorted(set(range(len(counts))) - set(decoding))
        if counts[row]
    ]
    num_tokens, num_decodes = query_starts[-1], sum(counts[row] for row in decoding)
    rest = block_table, seq_lens, prefill, filled, passed, spans
    return Step(num_tokens, slot_mapping[:num_tokens], num_decodes, *rest)


def to_device(values: list[list[int]], device: torch.device) -> torch.Tensor:
    """int64 [len(values), ...] on the device, without waiting for the copy."""
    host = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


@dataclass(frozen=True)
class FilledPages:
    """Full pages."""

    pages: torch.Tensor
    """int64 [M], ids."""
    numbers: torch.Tensor
    """int64 [M], where in their requests they are, from 0."""


def filled_pages(step: Step) -> FilledPages | None:
    """The pages that the step's decode tokens fill, in tensors of their own; None without any."""
    return _on_device(step.filled, step.block_table)


def _on_device(pages: list[tuple[int, int]], block_table: torch.Tensor) -> FilledPages | None:
    if not pages:
        return None
    rows, indices = to_device([list(column) for column in zip(*pages)], block_table.device)
    return FilledPages(block_table[rows, indices].long(), indices)
