"""The kernels of each device, behind one table: `prefill_attention` and `decode_attention` of `attention.py`.

Every function has the signature and the meaning of its plain torch form; a function that a device has no kernel
for is the torch form itself.
"""

from collections.abc import Callable
from dataclasses import dataclass

from vllm_lrqk.methods.lola.attention import decode_attention, prefill_attention


@dataclass(frozen=True)
class Kernels:
    """What one layer calls; see the torch form of each name."""

    name: str
    decode_attention: Callable[..., None]
    prefill_attention: Callable[..., None]


TORCH = Kernels("torch", decode_attention, prefill_attention)
