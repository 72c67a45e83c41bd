"""Huge pages: that the kernel gives them, before memory is written to and afterwards."""

import mmap
import platform
from pathlib import Path

import pytest
import torch

from vllm_lrqk.core.huge_pages import HUGE_PAGE_BYTES, ask_for_huge_pages

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes(tensor: torch.Tensor) -> int:
    """Bytes in huge pages of the mappings that hold a tensor."""
    found, is_inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, stop = (int(x, 16) for x in first.split("-"))
            is_inside = start < tensor.data_ptr() + tensor.nbytes and tensor.data_ptr() < stop
        elif is_inside and first == "AnonHugePages:":
            found += int(line.split()[1]) * 1024
    return found


@pytest.mark.skipif(not SWITCH.exists() or "[madvise]" not in SWITCH.read_text(), reason="decided by the system")
@pytest.mark.parametrize("is_written", [False, True])
def test_memory_is_in_huge_pages(is_written: bool) -> None:
    if is_written and tuple(map(int, platform.release().split(".")[:2])) < (6, 1):
        pytest.skip("this kernel cannot move pages together")
    # Its own mapping: what malloc gives may be memory of a tensor freed before, in small pages.
    tensor = torch.frombuffer(mmap.mmap(-1, 8 * HUGE_PAGE_BYTES, mmap.MAP_PRIVATE), dtype=torch.uint8)
    if is_written:
        tensor.fill_(7)
    before = huge_bytes(tensor)
    ask_for_huge_pages(tensor, is_written)
    if not is_written:
        tensor.fill_(7)
    assert huge_bytes(tensor) - before >= 6 * HUGE_PAGE_BYTES
    assert bool((tensor == 7).all())


def test_small_tensors_are_left_alone() -> None:
    tensor = torch.arange(mmap.PAGESIZE // 16, dtype=torch.uint8)
    ask_for_huge_pages(tensor, is_written=True)
    assert tensor.tolist() == [x % 256 for x in range(mmap.PAGESIZE // 16)]
