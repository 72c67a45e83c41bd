"""Loads the compiled CUDA kernels: csrc/cuda behind torch.ops.vllm_lrqk."""

from functools import cache
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).parent.parent / "_cuda_kernels.so"


@cache
def load() -> Any:
    """The operators whose names begin with cuda_. Needs no GPU.

    Raises:
        RuntimeError: in one sentence, why there are none: the library was not built, or it does not load.
    """
    if not LIBRARY.exists():
        raise RuntimeError(
            "vllm-lrqk was installed without its CUDA kernels: install it again with nvcc on the path and "
            f"VLLM_LRQK_FORCE_CUDA=1, as docs/cuda.md says; {LIBRARY} does not exist."
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        reason = " ".join(str(error.__cause__ or error).split()).rstrip(".")  # torch hides the loader's words
        raise RuntimeError(
            f"The CUDA kernels of vllm-lrqk do not load: install it again beside this torch; {LIBRARY} says: {reason}."
        ) from error
    return torch.ops.vllm_lrqk


def stream_handle(device: torch.device) -> int:
    """The current stream of a device as the operators take it."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; a few stand for a CPU that emulates one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
