"""The kernels of each device, behind one table."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Kernels:
    """What one layer calls; see the torch form of each name in `attention.py`."""

    name: str
    append: Callable[..., None]
    prefill_attention: Callable[..., None]
    decode_attention: Callable[..., None]


def kernels_for(device: torch.device) -> Kernels:
    """The best kernels of this device."""
    if device.type == "cpu":
        from vllm_lrqk.methods.aqua import cpu

        return cpu.kernels()
    from vllm_lrqk.methods.aqua import attention

    return attention.kernels()
