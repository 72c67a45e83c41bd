"""Loads the compiled CUDA kernels: csrc/cuda behind torch.ops.vllm_lrqk."""

import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)
LIBRARY = Path(__file__).parent.parent / "_cuda_kernels.so"


@cache
def operators() -> Any | None:
    """The operators whose names begin with cuda_, or None where they were not built or do not load."""
    if not LIBRARY.exists():
        logger.warning("CUDA kernels of vllm-lrqk were not built when it was installed; using Triton and torch.")
        return None
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        logger.warning("CUDA kernels of vllm-lrqk do not load (%s); using Triton and torch.", error)
        return None
    return torch.ops.vllm_lrqk


def stream_handle(device: torch.device) -> int:
    """The current stream of a device as the operators take it."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def is_capturing(device: torch.device) -> bool:
    """Whether the device's current stream is being captured into a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; a few stand for a CPU that emulates one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
