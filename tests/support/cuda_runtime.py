"""A stand-in for the part of the CUDA runtime that registers host memory, and for copies that know what it has."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class InvalidCopy(RuntimeError):
    """What CUDA calls an invalid argument."""


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


class RegisteredCopies(TorchDispatchMode):
    """Refuses copies as a GPU does: from or to host memory of which a part is in another registration, or in none."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self.runtime = runtime
        self.copies = 0
        """From or to registered memory."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name.split("::")[-1] in ("copy_", "_to_copy", "clone"):
            for tensor in args[:2]:
                if isinstance(tensor, torch.Tensor) and tensor.numel():
                    self._check(tensor)
        return function(*args, **(kwargs or {}))

    def _check(self, tensor: torch.Tensor) -> None:
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        first = tensor.data_ptr()
        last = first + reach * tensor.itemsize + tensor.itemsize - 1
        touched = [(start, start + size) for start, size in self.runtime.registered.items()
                   if start <= last and first < start + size]  # fmt: skip
        if not touched:
            return  # memory that pageable copies take
        self.copies += 1
        start, end = touched[0]
        if len(touched) > 1 or first < start or last >= end:
            raise InvalidCopy(f"a copy of {last + 1 - first} bytes reaches over the border of a registration")
