"""The host tier: full-precision keys and values in CPU memory, page for page beside vLLM's block ids."""

import math

import torch

from vllm_lrqk.core.huge_pages import HUGE_PAGE_BYTES, ask_for_huge_pages


def allocate_host_pages(
    num_pages: int, kv_heads: int, page_size: int, head_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """Host pages of one layer: [num_pages, kv_heads, page_size, 2, head_size], uninitialised.

    Keys are at index 0 of the fourth dimension and values at 1, so that a row's key and value are one run of bytes.
    The first byte is at a multiple of `HUGE_PAGE_BYTES`.
    """
    shape = (num_pages, kv_heads, page_size, 2, head_size)
    size = math.prod(shape) * dtype.itemsize
    memory = torch.empty(size + HUGE_PAGE_BYTES, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE_PAGE_BYTES
    pages = memory[start : start + size].view(dtype).view(shape)
    ask_for_huge_pages(pages)
    return pages


def append_rows(key: torch.Tensor, value: torch.Tensor, host: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Write new rows into the host pages.

    Args:
        key, value: [T, KV, d].
        host: [num_pages, KV, N, 2, d].
        slot_mapping: int64 [T], page id * N + offset; a negative one is skipped.
    """
    keep = slot_mapping >= 0
    if not bool(keep.all()):
        key, value, slot_mapping = key[keep], value[keep], slot_mapping[keep]
    page, offset = slot_mapping // host.shape[2], slot_mapping % host.shape[2]
    host[page, :, offset] = torch.stack([key, value], 2)
