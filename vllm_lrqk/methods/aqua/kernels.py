"""What computes the steps of a layer, behind one table."""

from collections.abc import Callable
from dataclasses import dataclass

from vllm_lrqk.methods.aqua.attention import append, decode_attention, prefill_attention


@dataclass(frozen=True)
class Kernels:
    """What one layer calls; see the torch form of each name in `attention.py`."""

    name: str
    append: Callable[..., None]
    prefill_attention: Callable[..., None]
    decode_attention: Callable[..., None]


TORCH = Kernels("torch", append, prefill_attention, decode_attention)
"""The plain torch forms."""
