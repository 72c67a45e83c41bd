"""What one forward step asks of every layer, derived once from the batch's metadata.

Shapes: T tokens of the step, B decode requests, P pages.
"""

from dataclasses import dataclass, field
from itertools import pairwise

import torch


@dataclass
class DecodeRequests:
    """Requests with one query token that are past their prompt."""

    tokens: torch.Tensor
    """int64 [B], index of each request's token in the step."""
    requests: torch.Tensor
    """int64 [B], row of each request in the batch."""
    block_table: torch.Tensor
    """int32 [B, P]."""
    seq_lens: torch.Tensor
    """int32 [B], the current token included."""
    filled_pages: torch.Tensor
    """int64 [M], ids of the pages that this step's tokens fill."""


@dataclass
class PrefillChunk:
    """Several tokens of one request, attended exactly."""

    start: int
    """First token in the step."""
    end: int
    """Past the last token in the step."""
    context_len: int
    """Tokens of the request before the chunk."""
    pages: torch.Tensor
    """int32 [P], the request's pages in order."""
    filled: list[tuple[int, int, int]] = field(default_factory=list)
    """Pages that the chunk fills, one after the other: (index in `pages`, first and past-the-last of its tokens)."""


@dataclass
class Step:
    """One forward step."""

    num_tokens: int
    slots: torch.Tensor
    """int64 [T], page id * page size + offset of each token."""
    decode: DecodeRequests | None
    prefill: list[PrefillChunk]
    number: int = 0
    """Counts steps; the hot cache's clock."""


def prefill_chunk(start: int, end: int, length: int, pages: torch.Tensor, page_size: int) -> PrefillChunk:
    """The chunk of tokens start ... end - 1 of a step, the last of a request that has `length` tokens by then."""
    context_len = length - (end - start)
    chunk = PrefillChunk(start, end, context_len, pages)
    for page in range(context_len // page_size, length // page_size):
        first = max(page * page_size - context_len, 0)
        chunk.filled.append((page, first, (page + 1) * page_size - context_len))
    return chunk


def build_step(
    query_starts: list[int],
    seq_lens: torch.Tensor,
    is_prefilling: list[bool],
    block_table: torch.Tensor,
    slots: torch.Tensor,
    page_size: int,
    number: int = 0,
) -> Step:
    """Split a batch into decode requests and prefill chunks.

    A request decodes when it is past its prompt and has one query token; everything else is exact.

    Args:
        query_starts: R + 1 offsets of the requests' tokens.
        seq_lens: int32 [R], tokens of each request, this step's included.
        is_prefilling: R flags.
        block_table: int32 [R, P].
        slots: int64 [T].
    """
    lens = seq_lens.tolist()
    decode_rows: list[int] = []
    prefill: list[PrefillChunk] = []
    for row, (start, end) in enumerate(pairwise(query_starts)):
        if end - start == 1 and not is_prefilling[row]:
            decode_rows.append(row)
        elif end > start:
            prefill.append(prefill_chunk(start, end, lens[row], block_table[row], page_size))
    decode = None
    if decode_rows:
        rows = torch.tensor(decode_rows)
        table, decode_lens = block_table[rows], seq_lens[rows]
        filled = decode_lens % page_size == 0
        last_page = (decode_lens[filled] // page_size - 1).long()
        filled_pages = table[filled].gather(1, last_page[:, None])[:, 0].long()
        tokens = torch.tensor([query_starts[row] for row in decode_rows])
        decode = DecodeRequests(tokens, rows, table, decode_lens, filled_pages)
    return Step(query_starts[-1], slots[: query_starts[-1]], decode, prefill, number)
