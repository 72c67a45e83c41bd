"""Which kernels a device gets.

kernels = kernels_for(query.device)
kernels.decode_attention(query, host, factors, block_table, seq_lens, scale, config, output)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from vllm_lrqk.methods.lrqk.kernels import Kernels


def _torch_kernels() -> Kernels:
    from vllm_lrqk.methods.lrqk.torch_ops import kernels

    return kernels()


def _cpu_kernels() -> Kernels:
    from vllm_lrqk.methods.lrqk import cpu

    return cpu.kernels()


def _cuda_kernels() -> Kernels:
    from vllm_lrqk.methods.lrqk import cuda

    return cuda.kernels()


_FACTORIES: dict[str, Callable[[], Kernels]] = {"cpu": _cpu_kernels, "cuda": _cuda_kernels}
_forced: ContextVar[Kernels | None] = ContextVar("forced_kernels", default=None)
_cache: dict[str, Kernels] = {}


def kernels_for(device: torch.device) -> Kernels:
    """The best kernels of this device."""
    forced = _forced.get()
    if forced is not None:
        return forced
    if device.type not in _cache:
        _cache[device.type] = _FACTORIES.get(device.type, _torch_kernels)()
    return _cache[device.type]


@contextmanager
def force_kernels(name: str) -> Iterator[Kernels]:
    """Let `kernels_for` answer with the kernels of one name: "torch", or a CPU instruction set.

    Raises:
        ValueError: this machine or this build has no such kernels.
    """
    if name == "torch":
        kernels = _torch_kernels()
    else:
        from vllm_lrqk.methods.lrqk import cpu

        kernels = cpu.kernels(name)
    token = _forced.set(kernels)
    try:
        yield kernels
    finally:
        _forced.reset(token)
