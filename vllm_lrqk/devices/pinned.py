"""Host pages that a CUDA device reads and writes: CPU memory registered with CUDA in chunks.

Registering in place, chunk by chunk, takes no second copy of the memory, lets a refusal say how far it came, and lets
release give the rest up when its time is over: the operating system takes registered memory back with the process.
"""

import logging
import math
import mmap
import time
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch

logger = logging.getLogger("vllm.lrqk")  # below vLLM's own, whose level and handlers hold for it
CHUNK_BYTES = 4 << 30
RELEASE_SECONDS = 10.0
_REGISTER_FLAGS = 1 | 2  # cudaHostRegisterPortable | cudaHostRegisterMapped


class Runtime(Protocol):
    """The part of `torch.cuda.cudart()` that registers memory."""

    def cudaHostRegister(self, pointer: int, num_bytes: int, flags: int) -> Any: ...
    def cudaHostUnregister(self, pointer: int) -> Any: ...


def chunk_rows(tensor: torch.Tensor, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Rows of the first dimension that one registration takes.

    CUDA refuses a copy that reaches from one registration into another, so larger copies go part by part:
    `tensor.split(chunk_rows(tensor))`. That holds for tensors that begin at a page of the system.
    """
    row_bytes = tensor.stride(0) * tensor.itemsize
    unit = math.lcm(row_bytes, mmap.PAGESIZE)
    return max(unit, chunk_bytes // unit * unit) // row_bytes


def chunk_starts(start: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    """First and past-the-last address of each chunk; only at the ends does a chunk share a page of the system.

    Args:
        step: bytes, a multiple of the system's page.
    """
    stop = start // mmap.PAGESIZE * mmap.PAGESIZE
    while start < end:
        stop += step
        yield start, min(stop, end)
        start = stop


class PinnedMemory:
    """Registers the memory of a CPU tensor for as long as this object is not released.

    Args:
        tensor: contiguous, in CPU memory; its first dimension is what copies do not split.
        runtime: `torch.cuda.cudart()`.

    Raises:
        RuntimeError: CUDA refuses a chunk; the chunks before it are given back.
    """

    def __init__(self, tensor: torch.Tensor, runtime: Runtime, chunk_bytes: int = CHUNK_BYTES) -> None:
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError("only contiguous tensors in CPU memory can be registered")
        self.tensor = tensor
        self._runtime = runtime
        self._chunks: list[int] = []
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        step = chunk_rows(tensor, chunk_bytes) * tensor.stride(0) * tensor.itemsize
        for pointer, stop in chunk_starts(start, end, step):
            error = int(runtime.cudaHostRegister(pointer, stop - pointer, _REGISTER_FLAGS))
            if error:
                self.release()
                raise RuntimeError(
                    f"CUDA error {error}: {(pointer - start) / 2**30:.3g} of {tensor.nbytes / 2**30:.3g} GiB of host "
                    "memory could be registered; lower lrqk.host_memory_gib or raise the limit of locked memory."
                )
            self._chunks.append(pointer)

    @property
    def num_chunks(self) -> int:
        """Chunks that are registered now."""
        return len(self._chunks)

    def release(self, seconds: float = RELEASE_SECONDS) -> bool:
        """Give the chunks back, for `seconds` at most; whether all of them are. Safe to call again."""
        deadline = time.monotonic() + seconds
        while self._chunks and time.monotonic() < deadline:
            error = int(self._runtime.cudaHostUnregister(self._chunks.pop()))
            if error:
                logger.warning("CUDA error %d while giving back host memory.", error)
        if self._chunks:
            logger.warning("%d chunks of host memory are left to the end of the process.", len(self._chunks))
        return not self._chunks


_left_over: list[PinnedMemory] = []
"""Memory that could not be given back in time: freeing it while it is registered is not allowed."""


def release_all(memories: Iterable[PinnedMemory], seconds: float = RELEASE_SECONDS) -> bool:
    """Give back the memory of several tensors, for `seconds` in all; what is left stays to the end of the process."""
    deadline = time.monotonic() + seconds
    left = [memory for memory in memories if not memory.release(max(0.0, deadline - time.monotonic()))]
    _left_over.extend(left)
    return not left


def released_with(owner: Any) -> list[PinnedMemory]:
    """A list for registered memory that is given back when `owner` is collected; the end of the process needs none."""
    memories: list[PinnedMemory] = []
    weakref.finalize(owner, _release_and_forget, memories).atexit = False
    return memories


def _release_and_forget(memories: list[PinnedMemory]) -> None:
    release_all(memories)
    memories.clear()


def device_address(tensor: torch.Tensor, operators: Any) -> int:
    """Where the device sees a registered tensor.

    Raises:
        RuntimeError: not where the host does, which the kernels rely on.
    """
    pointer = operators.cuda_device_pointer(tensor.data_ptr())
    if pointer != tensor.data_ptr():
        raise RuntimeError("this device does not see registered host memory at the host's addresses")
    return pointer
