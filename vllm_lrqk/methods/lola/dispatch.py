"""Which kernels a device gets."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from vllm_lrqk.methods.lola import cpu
from vllm_lrqk.methods.lola.kernels import TORCH, Kernels

_forced: ContextVar[Kernels | None] = ContextVar("forced_lola_kernels", default=None)


def kernels_for(device: torch.device) -> Kernels:
    """The best kernels of this device."""
    forced = _forced.get()
    if forced is not None:
        return forced
    if device.type == "cuda":
        from vllm_lrqk.methods.lola import cuda

        return cuda.kernels(torch.cuda.get_device_properties(device).multi_processor_count)
    return cpu.kernels() if device.type == "cpu" else TORCH


@contextmanager
def force_kernels(name: str) -> Iterator[Kernels]:
    """Let `kernels_for` answer with the kernels of one name: "torch", or a CPU instruction set.

    Raises:
        ValueError: this machine or this build has no such kernels.
    """
    kernels = TORCH if name == "torch" else cpu.kernels(name)
    token = _forced.set(kernels)
    try:
        yield kernels
    finally:
        _forced.reset(token)
