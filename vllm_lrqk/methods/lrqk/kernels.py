"""The kernels of one device as a table.

Every function has the signature and the meaning of its plain torch form; a function that a device has no kernel
for is the torch form itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class PageKernels:
    """What a layer calls on whole pages; see the torch form of each name."""

    name: str
    seal_pages: Callable[..., None]
    prefill_attention: Callable[..., None]
    seal_layers: Callable[..., None] | None = None
    """Seals the same pages of several layers: (pages, hosts, factors, config); None: one by one."""
    prefill_prompts: Callable[..., None] | None = None
    """Attends several prompts without history: (query, key, value, run, scale, output); None: one by one."""


@dataclass(frozen=True, kw_only=True)
class Kernels(PageKernels):
    """And what a decoder calls where device and host memory are the same."""

    append_rows: Callable[..., None]
    seal_calibrated: Callable[..., None]
    select: Callable[..., Any]
    decode_attention: Callable[..., torch.Tensor]
