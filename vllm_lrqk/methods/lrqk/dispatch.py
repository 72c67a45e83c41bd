"""Which kernels serve tensors in CPU memory.

kernels = host_kernels()
kernels.decode_attention(query, host, factors, block_table, seq_lens, scale, config, output)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from vllm_lrqk.methods.lrqk import cpu, torch_ops
from vllm_lrqk.methods.lrqk.kernels import Kernels

_forced: ContextVar[Kernels | None] = ContextVar("forced_kernels", default=None)


def host_kernels() -> Kernels:
    """The best kernels of this machine, or the plain torch forms where none were built."""
    return _forced.get() or cpu.kernels()


@contextmanager
def force_kernels(name: str) -> Iterator[Kernels]:
    """Let `host_kernels` answer with the kernels of one name: "torch", or an instruction set.

    Raises:
        ValueError: this machine or this build has no such kernels.
    """
    kernels = torch_ops.kernels() if name == "torch" else cpu.kernels(name)
    token = _forced.set(kernels)
    try:
        yield kernels
    finally:
        _forced.reset(token)
