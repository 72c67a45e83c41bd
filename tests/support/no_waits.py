"""Fails on whatever would make the host wait for the device, on any device: for code that is captured into graphs.

Torch's own check (`torch.cuda.set_sync_debug_mode`) needs a GPU. Here every operator and every method that hands a
value to the host is refused by name, on CPU tensors too, where nothing would wait.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

METHODS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__", "equal"}
OPERATORS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "is_nonzero", "equal", "_unique2"}
OPERATORS |= {
    "_linalg_check_errors",
    "_linalg_eigh",
    "unique_consecutive",
    "unique_dim",
    "repeat_interleave",
    "nonzero_static",
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "zeros", "ones", "full", "clone", "new_empty", "zeros_like"}


class Waited(AssertionError):
    """The code under test would have waited, or allocated."""


class _Operators(TorchDispatchMode):
    def __init__(self, may_allocate: bool) -> None:
        super().__init__()
        self.may_allocate = may_allocate

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.split("::")[-1]
        indices = args[1] if name in INDEXING else ()
        is_masked = any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices)
        if name in OPERATORS or is_masked:
            raise Waited(f"{name} makes the host wait")
        if name in ALLOCATIONS and not self.may_allocate:
            raise Waited(f"{name} allocates")
        return function(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        asked = {"non_blocking": False} | (kwargs or {})
        is_to_host = name == "to" and not asked["non_blocking"] and "cpu" in map(str, (*args[1:], *asked.values()))
        if name in METHODS or is_to_host:
            raise Waited(f"{name} makes the host wait")
        return function(*args, **(kwargs or {}))


@contextmanager
def no_waits(may_allocate: bool) -> Iterator[None]:
    """Raise `Waited` at the first thing that would wait; with `may_allocate` False also at an allocation."""
    with _Methods(), _Operators(may_allocate):
        yield


class Recorded:
    """Operators whose calls are noted instead of run: their names and what a captured graph would keep of them."""

    def __init__(self, operators: Any, prefix: str = "") -> None:
        self._operators = operators
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name == "cuda_select_bytes":
            return getattr(self._operators, name)

        def call(*args: Any) -> None:
            self.calls.append((name, *map(frozen, args)))

        return call


class RecordedKernel:
    """In the place of a Triton kernel: notes its launches."""

    def __init__(self, name: str, calls: list[tuple[Any, ...]]) -> None:
        self.name, self.calls = name, calls

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            self.calls.append((self.name, grid, *map(frozen, args), *sorted(map(str, constants.items()))))

        return launch


def frozen(value: Any) -> Any:
    """What of an argument a captured graph keeps: a tensor's address, shape and strides, any other value itself."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), tuple(value.shape), value.stride()
    return value
