"""The kernels of one device as a table.

Every function has the signature and the meaning of its plain torch form; a function that a device has no kernel
for is the torch form itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Kernels:
    """What one layer calls; see the torch form of each name."""

    name: str
    append_rows: Callable[..., None]
    seal_pages: Callable[..., None]
    select: Callable[..., Any]
    decode_attention: Callable[..., torch.Tensor]
    prefill_attention: Callable[..., None]
