"""What is particular to CUDA devices: checks at start-up, and the memory of decode steps that all layers share."""

from typing import Any

import torch

from vllm_lrqk.core.host_pages import GIB
from vllm_lrqk.devices import cuda_library
from vllm_lrqk.devices.pinned import MAX_PINNED_SHARE
from vllm_lrqk.integration.blocks import hot_format
from vllm_lrqk.methods.lrqk.cuda_select import MAX_HEAD_SIZE, MAX_RANK, MAX_TOKENS
from vllm_lrqk.methods.lrqk.settings import ConfigError, LRQKConfig


def device_operators() -> Any | None:
    """The operators of the CUDA kernels where vLLM runs on a CUDA device, else None."""
    from vllm.platforms import current_platform

    return cuda_library.operators() if current_platform.is_cuda() else None


def current_device(vllm_config: Any) -> torch.device:
    """This worker's device."""
    kind = vllm_config.device_config.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def check_device(vllm_config: Any, config: LRQKConfig) -> None:
    """Refuse what the CUDA kernels cannot serve.

    Raises:
        ConfigError: the first thing found.
    """
    model = vllm_config.model_config
    head_size, tokens = model.get_head_size(), model.max_model_len
    if not cuda_library.LIBRARY.exists():
        raise ConfigError(
            "vllm-lrqk was installed without its CUDA kernels: install it again with nvcc on the path (docs/cuda.md)."
        )
    if config.hot_cache is False:
        raise ConfigError('lrqk.hot_cache is false, but a GPU needs the hot cache: set it to "auto".')
    if config.rank > MAX_RANK:
        raise ConfigError(f"lrqk.rank is {config.rank}, but the CUDA kernels serve up to {MAX_RANK}: lower it.")
    if head_size > MAX_HEAD_SIZE or head_size % 8:
        raise ConfigError(
            f"LRQK on a GPU needs a head size that is a multiple of 8 and at most {MAX_HEAD_SIZE}, and that of "
            f"{model.model} is {head_size}: serve it with another attention backend."
        )
    if tokens + config.page_size > MAX_TOKENS:
        raise ConfigError(
            f"--max-model-len is {tokens}, but LRQK on a GPU serves {MAX_TOKENS - config.page_size} tokens at most: "
            "lower it."
        )


def check_pinned_share(memory_bytes: int, free_bytes: int) -> None:
    """Refuse to pin more than `MAX_PINNED_SHARE` of a host's free memory.

    Args:
        memory_bytes: of the host tier, all ranks of this host together.

    Raises:
        ConfigError: it is more.
    """
    most = free_bytes * MAX_PINNED_SHARE
    if memory_bytes > most:
        raise ConfigError(
            f"lrqk.host_memory_gib is {memory_bytes / GIB:.3g}, but of the {free_bytes / GIB:.3g} GiB that are free "
            f"at most {MAX_PINNED_SHARE:.0%} may be pinned: lower it to {most / GIB:.3g}."
        )


def make_decode_path(
    operators: Any, vllm_config: Any, config: LRQKConfig, heads: int, kv_heads: int, head_size: int
) -> Any:
    """Memory and launches of decode steps; taken while the model is loaded, so that vLLM's profiling counts it."""
    from vllm_lrqk.methods.lrqk.cuda_decode import DecodePath, requests_at_once

    form = hot_format(config, head_size, vllm_config.model_config.dtype)
    hot_blocks = form.blocks_for(config.num_hot_rows)
    max_pages = -(-vllm_config.model_config.max_model_len // config.page_size)
    requests = requests_at_once(
        operators,
        vllm_config.scheduler_config.max_num_seqs,
        max_pages,
        heads,
        kv_heads,
        hot_blocks * form.rows_per_block,
        config,
    )
    device = current_device(vllm_config)
    return DecodePath(operators, requests, max_pages, heads, kv_heads, form, hot_blocks, config, device)
