"""Huge pages for memory that decode steps read from all over: with small ones they would miss the TLB at each row."""

import ctypes
import mmap

import torch

HUGE_PAGE_BYTES = 2 << 20
"""Of x86-64; a multiple of the system's own pages everywhere."""
MADV_COLLAPSE = 25
"""Of Linux since 6.1; Python has no name for it."""


def ask_for_huge_pages(tensor: torch.Tensor, is_written: bool = False) -> None:
    """Ask the kernel for huge pages, where it has them; what it refuses stays as it is.

    Args:
        tensor: a contiguous tensor on the CPU.
        is_written: whether it has been written to, so that it has small pages already, which are copied into huge ones.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if length <= 0:
        return
    libc = ctypes.CDLL(None)
    for advice in (mmap.MADV_HUGEPAGE, MADV_COLLAPSE) if is_written else (mmap.MADV_HUGEPAGE,):
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)
