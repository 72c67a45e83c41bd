"""The hot tier: rows that recent steps used, in device memory, a constant number per request and KV head.

A request's hot slots live in blocks of vLLM's own pool (as large as a factor page). Per (block, KV head):

    | kv                | row           | tag           | last_used     | padding |
    | [S, 2, d] of K, V | [S] int32     | [S] int32     | [S] int32     |         |

A slot says which host row it mirrors (`row` = page id * N + offset) and the tag of that row's page at the
time. A page's generation grows whenever the page is written from its beginning, so a slot is valid only
while its tag matches: blocks change hands without being cleared, and a row of a page that another request
has since taken over is never mistaken for the old one. A row that is written anew in the middle of its page, where a
drafted token was rejected, is that of the current token when it is wanted again, which no slot is trusted with.
"""

from dataclasses import dataclass

import torch

from vllm_lrqk.core.attend import gather_rows

_TAG_MULTIPLIER = 0x9E3779B1


@dataclass(frozen=True)
class HotFormat:
    """Sizes of one hot block."""

    block_bytes: int
    head_size: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: its key and value."""
        return 2 * self.head_size * self.dtype.itemsize

    @property
    def rows_per_block(self) -> int:
        return self.block_bytes // (self.row_bytes + 3 * 4)

    def blocks_for(self, rows: int) -> int:
        """Blocks that hold `rows` slots."""
        return -(-rows // self.rows_per_block)


@dataclass
class Fetch:
    """Counts of one resolve."""

    hits: int
    misses: int


class HotRows:
    """Hot slots of one layer, and the generations of its host pages.

    Args:
        raw: uint8 [num_blocks, KV, block_bytes].
        num_host_pages: pages of the host tier.
    """

    def __init__(self, raw: torch.Tensor, hot_format: HotFormat, num_host_pages: int) -> None:
        f, count = hot_format, hot_format.rows_per_block
        self.format = f
        self.raw = raw

        def view(start: int, length: int, dtype: torch.dtype) -> torch.Tensor:
            return raw[..., start : start + length * dtype.itemsize].view(dtype)

        end = count * f.row_bytes
        self.kv = view(0, count * 2 * f.head_size, f.dtype).unflatten(-1, (count, 2, f.head_size))
        self.row = view(end, count, torch.int32)
        self.tag = view(end + count * 4, count, torch.int32)
        self.last_used = view(end + count * 8, count, torch.int32)
        self.generation = torch.zeros(num_host_pages, dtype=torch.int64, device=raw.device)


class HotCache(HotRows):
    """Hot slots in plain torch."""

    def pages_written(self, slot_mapping: torch.Tensor, page_size: int) -> None:
        """Note the rows, int64 [T], that a step writes: a page written at its first token is a new page."""
        starts = slot_mapping[(slot_mapping >= 0) & (slot_mapping % page_size == 0)]
        self.generation[starts // page_size] += 1

    def resolve(
        self,
        rows: torch.Tensor,
        host: torch.Tensor,
        block_table: torch.Tensor,
        hot_blocks: torch.Tensor,
        seq_lens: torch.Tensor,
        step_number: int,
    ) -> tuple[torch.Tensor, Fetch]:
        """Keys and values of the wanted rows; missing ones replace the least recently used slots.

        Args:
            rows: int32 [B, KV, R], token positions, -1 for none; R is at most the slots per request.
            host: [num_pages, KV, N, 2, d].
            block_table: int32 [B, P].
            hot_blocks: int32 [B, M], the request's hot blocks.
            seq_lens: int32 [B]; the row of the current token, just computed, is no fetch from the host, and no hit
                either: a slot may still hold that of a token that was drafted here and rejected.

        Returns:
            [B, KV, R, 2, d] and the counts.
        """
        page_size = host.shape[2]
        wanted, wanted_tag = self._identify(rows, block_table, page_size)
        blocks = hot_blocks.long()
        self._forget(self._identify((seq_lens - 1)[:, None, None], block_table, page_size)[0], blocks)
        slot_row = self._gather(self.row, blocks)  # [B, KV, slots]
        slot_tag, slot_used = self._gather(self.tag, blocks), self._gather(self.last_used, blocks)
        in_range = (slot_row >= 0) & (slot_row < len(self.generation) * page_size)
        live = in_range & (slot_tag == self._tag(slot_row.clamp(0, len(self.generation) * page_size - 1), page_size))
        slot_row = torch.where(live, slot_row, -1)

        ordered, order = slot_row.sort(-1)
        place = torch.searchsorted(ordered, wanted).clamp_max(ordered.shape[-1] - 1)
        is_wanted = wanted >= 0
        hit = is_wanted & (ordered.gather(-1, place) == wanted)
        miss = is_wanted & ~hit
        slot = order.gather(-1, place)

        protected = torch.zeros_like(slot_row).scatter_add_(-1, slot, hit.long()) > 0
        age = torch.where(live, slot_used.long(), -1).masked_fill(protected, torch.iinfo(torch.int64).max)
        victims = age.argsort(-1)
        turn = (miss.cumsum(-1) - 1).clamp_min(0)
        slot = torch.where(miss, victims.gather(-1, turn), slot)

        block_index, block_slot = slot // self.format.rows_per_block, slot % self.format.rows_per_block
        block = blocks.gather(1, block_index.flatten(1)).view_as(slot)
        head = torch.arange(slot.shape[1])[None, :, None].expand_as(slot)
        at = (block[miss], head[miss], block_slot[miss])
        self.kv[at] = gather_rows(host, block_table, rows)[miss]
        self.row[at] = wanted[miss].int()
        self.tag[at] = wanted_tag[miss].int()
        self.last_used[block[is_wanted], head[is_wanted], block_slot[is_wanted]] = step_number
        fetched = miss & (rows != seq_lens[:, None, None] - 1)
        return self.kv[block, head, block_slot], Fetch(int(hit.sum()), int(fetched.sum()))

    def _identify(
        self, rows: torch.Tensor, block_table: torch.Tensor, page_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        position = rows.long().clamp_min(0)
        page = block_table.long().gather(1, (position // page_size).flatten(1)).view_as(position)
        row = page * page_size + position % page_size
        return torch.where(rows >= 0, row, -1), self._tag(row, page_size)

    def _forget(self, rows: torch.Tensor, blocks: torch.Tensor) -> None:
        """Empty the slots of `blocks`, int64 [B, M], that hold the request's one of `rows`, int64 [B, 1, 1]."""
        held = self.row[blocks]  # [B, M, KV, S]
        self.row[blocks] = torch.where(held == rows[..., None], -1, held)

    def _tag(self, row: torch.Tensor, page_size: int) -> torch.Tensor:
        """A 32-bit mark of a row and its page's generation, as signed values in int64."""
        mixed = (self.generation[row // page_size] * _TAG_MULTIPLIER + row + 1) * _TAG_MULTIPLIER
        return ((mixed >> 8) & 0xFFFFFFFF) - (1 << 31)

    @staticmethod
    def _gather(field: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """[num_blocks, KV, S] -> int64 [B, KV, M * S]."""
        return field[blocks].transpose(1, 2).flatten(2).long()
