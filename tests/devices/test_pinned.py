"""Registering host memory in chunks, with a stand-in for CUDA's runtime."""

import itertools
import mmap

import pytest
import torch
from cuda_runtime import Runtime

from vllm_lrqk.core.host_pages import allocate_host_pages
from vllm_lrqk.devices import pinned
from vllm_lrqk.devices.pinned import PinnedMemory, chunk_rows, device_address

PAGE = mmap.PAGESIZE
CHUNK = 3 * PAGE


def memory_of(num_bytes: int) -> torch.Tensor:
    """A tensor that begins in the middle of a page of the system, as torch's large ones do."""
    whole = torch.zeros(num_bytes + PAGE, dtype=torch.uint8)
    return whole[-whole.data_ptr() % PAGE + 64 :][: num_bytes - 64]


def test_registers_every_byte_once() -> None:
    """No page belongs to two chunks: CUDA refuses a page that is registered already."""
    runtime, tensor = Runtime(), memory_of(10 * PAGE)
    memory = PinnedMemory(tensor, runtime, chunk_bytes=CHUNK)
    base = tensor.data_ptr() - 64
    starts = [base + 64, base + CHUNK, base + 2 * CHUNK, base + 3 * CHUNK]
    assert runtime.registered == dict(zip(starts, [CHUNK - 64, CHUNK, CHUNK, PAGE]))
    assert runtime.flags == {3}  # portable and mapped
    assert memory.num_chunks == 4
    assert memory.release()
    assert memory.release()
    assert not runtime.registered


@pytest.mark.parametrize(("kv_heads", "page_size", "dtype"), [(8, 16, torch.bfloat16), (3, 16, torch.float32)])
def test_no_host_page_reaches_into_two_chunks(kv_heads: int, page_size: int, dtype: torch.dtype) -> None:
    """A copy of a page must not cross from one registration into another."""
    host, runtime = allocate_host_pages(40, kv_heads, page_size, 96, dtype), Runtime()
    page_bytes = host[0].nbytes
    PinnedMemory(host, runtime, chunk_bytes=7 * page_bytes + 100)
    assert len(runtime.registered) > 1
    assert sum(runtime.registered.values()) == host.nbytes
    for pointer in runtime.registered:
        assert (pointer - host.data_ptr()) % page_bytes == 0
        assert pointer % PAGE == 0
    parts = host.split(chunk_rows(host, 7 * page_bytes + 100))
    assert [part.data_ptr() for part in parts] == list(runtime.registered)


def test_a_chunk_has_a_page_at_least() -> None:
    tensor, runtime = memory_of(3 * PAGE), Runtime()
    PinnedMemory(tensor, runtime, chunk_bytes=1)
    assert sum(runtime.registered.values()) == tensor.nbytes
    assert len(runtime.registered) == 3


def test_refusal_gives_back_what_it_has() -> None:
    runtime = Runtime(limit=7 * PAGE)
    with pytest.raises(RuntimeError, match=r"CUDA error 2: .* host memory could be registered"):
        PinnedMemory(memory_of(10 * PAGE), runtime, chunk_bytes=CHUNK)
    assert not runtime.registered


class Clock:
    """Time that goes on by a second whenever somebody looks."""

    def __init__(self) -> None:
        self.seconds = itertools.count()

    def monotonic(self) -> float:
        return float(next(self.seconds))


def test_release_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    memory = PinnedMemory(memory_of(10 * PAGE), runtime, chunk_bytes=PAGE)
    monkeypatch.setattr(pinned, "time", Clock())
    assert not memory.release(seconds=4)
    assert memory.num_chunks == len(runtime.registered) == 7
    assert memory.release(seconds=100)


def test_release_of_all_layers_has_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left is kept until the end of the process: memory must not be freed while it is registered."""
    runtime = Runtime()
    memories = [PinnedMemory(memory_of(4 * PAGE), runtime, chunk_bytes=PAGE) for _ in range(3)]
    monkeypatch.setattr(pinned, "time", Clock())
    monkeypatch.setattr(pinned, "_left_over", [])
    assert not pinned.release_all(memories, seconds=8)
    assert 0 < len(runtime.registered) < 12
    assert pinned._left_over
    assert all(memory.num_chunks for memory in pinned._left_over)
    assert pinned.release_all(memories, seconds=1000)
    assert not runtime.registered


def test_memory_goes_with_its_owner() -> None:
    class Owner:
        pass

    runtime, owner = Runtime(), Owner()
    memories = pinned.released_with(owner)
    memories.append(PinnedMemory(memory_of(4 * PAGE), runtime))
    assert runtime.registered
    del owner
    assert not runtime.registered
    assert not memories


def test_only_plain_cpu_memory() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        PinnedMemory(torch.zeros(10, 10)[:, :5], Runtime())


def test_device_must_see_the_same_addresses() -> None:
    class Operators:
        offset = 0

        def cuda_device_pointer(self, pointer: int) -> int:
            return pointer + self.offset

    tensor, operators = torch.zeros(10), Operators()
    assert device_address(tensor, operators) == tensor.data_ptr()
    operators.offset = 64
    with pytest.raises(RuntimeError, match="host's addresses"):
        device_address(tensor, operators)
