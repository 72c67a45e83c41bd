"""Counts operators that launch something on a device: all but views and allocations.

Operators of linear algebra may launch several kernels each; what a GPU does is not seen here.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

SILENT = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "lift_fresh", "_unsafe_view"}


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.split("::")[-1]
        if not function.is_view and name not in SILENT:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def launches() -> Iterator[Counter[str]]:
    """The operators of the block by name, filled as it runs."""
    with _Counted() as mode:
        yield mode.counts
