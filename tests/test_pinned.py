"""Registering host memory in chunks, with a stand-in for CUDA's runtime."""

import itertools

import pytest
import torch

from vllm_lrqk import pinned
from vllm_lrqk.pinned import PinnedMemory, device_address


class Runtime:
    """Keeps what is registered; refuses once more than `limit` bytes would be."""

    def __init__(self, limit: int = 1 << 60) -> None:
        self.limit = limit
        self.registered: dict[int, int] = {}
        self.flags: set[int] = set()

    def cudaHostRegister(self, pointer: int, num_bytes: int, flags: int) -> int:
        if sum(self.registered.values()) + num_bytes > self.limit:
            return 2
        self.registered[pointer] = num_bytes
        self.flags.add(flags)
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        del self.registered[pointer]
        return 0


def test_registers_every_byte_once() -> None:
    runtime, tensor = Runtime(), torch.zeros(1000, dtype=torch.uint8)
    memory = PinnedMemory(tensor, runtime, chunk_bytes=300)
    start = tensor.data_ptr()
    assert runtime.registered == {start: 300, start + 300: 300, start + 600: 300, start + 900: 100}
    assert runtime.flags == {3}  # portable and mapped
    assert memory.num_chunks == 4
    assert memory.release()
    assert memory.release()
    assert not runtime.registered


def test_refusal_gives_back_what_it_has() -> None:
    runtime = Runtime(limit=700)
    with pytest.raises(RuntimeError, match=r"CUDA error 2: .* host memory could be registered"):
        PinnedMemory(torch.zeros(1000, dtype=torch.uint8), runtime, chunk_bytes=300)
    assert not runtime.registered


def test_release_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    memory = PinnedMemory(torch.zeros(1000, dtype=torch.uint8), runtime, chunk_bytes=100)
    seconds = itertools.count()
    monkeypatch.setattr(pinned.time, "monotonic", lambda: float(next(seconds)))
    assert not memory.release(seconds=4)
    assert memory.num_chunks == len(runtime.registered) == 7
    assert memory.release(seconds=100)


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
