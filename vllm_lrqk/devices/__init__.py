"""Kernels and memory of the devices that no method owns."""

from typing import Any

import torch


def cuda_operators(device: torch.device) -> Any | None:
    """The operators of the CUDA kernels for a CUDA device; None for every other one, which takes the CPU's path.

    Raises:
        RuntimeError: the kernels are missing or do not load.
    """
    if device.type != "cuda":
        return None
    from vllm_lrqk.devices import cuda_library

    return cuda_library.load()
