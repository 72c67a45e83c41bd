"""The kernels of each device, behind one table: `prefill_attention` and `decode_attention` of `attention.py`.

Every function has the signature and the meaning of its plain torch form; a function that a device has no kernel
for is the torch form itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from vllm_lrqk.methods.lola.attention import decode_attention, prefill_attention


@dataclass(frozen=True)
class Kernels:
    """What one layer calls; see the torch form of each name."""

    name: str
    decode_attention: Callable[..., None]
    prefill_attention: Callable[..., None]


TORCH = Kernels("torch", decode_attention, prefill_attention)
_forced: ContextVar[Kernels | None] = ContextVar("forced_lola_kernels", default=None)


def kernels_for(device: torch.device) -> Kernels:
    """The best kernels of this device."""
    forced = _forced.get()
    if forced is not None:
        return forced
    return _cpu_kernels() if device.type == "cpu" else TORCH


def _cpu_kernels(name: str | None = None) -> Kernels:
    from vllm_lrqk.methods.lola import cpu

    return cpu.kernels(name)


@contextmanager
def force_kernels(name: str) -> Iterator[Kernels]:
    """Let `kernels_for` answer with the kernels of one name: "torch", or a CPU instruction set.

    Raises:
        ValueError: this machine or this build has no such kernels.
    """
    kernels = TORCH if name == "torch" else _cpu_kernels(name)
    token = _forced.set(kernels)
    try:
        yield kernels
    finally:
        _forced.reset(token)
