"""What happens once per engine before anything is allocated: settings are checked and completed."""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_lrqk.core.host_pages import DEFAULT_MEMORY_SHARE, GIB, free_host_memory, host_page_bytes
from vllm_lrqk.integration import compat
from vllm_lrqk.integration.blocks import hot_format, page_format
from vllm_lrqk.integration.checks import check_model, check_selector
from vllm_lrqk.integration.device import check_device, check_pinned_share
from vllm_lrqk.methods.lrqk.settings import ConfigError, LRQKConfig
from vllm_lrqk.plugin import BACKEND

logger = compat.logger("lrqk")


class ResolvedSettings(dict):
    """vLLM's `additional_config` plus the host memory that this engine settled on.

    An attribute rather than an item: it reaches every worker with the configuration, but stays out of
    the hash that names compiled graphs, which a figure of free memory would change at every start.
    """

    host_memory_bytes: int | None = None


@dataclass(frozen=True)
class HostPlan:
    """How the host tier of one rank is cut."""

    memory_bytes: int
    page_bytes: int

    @property
    def num_pages(self) -> int:
        """Host pages, the null block's included."""
        return self.memory_bytes // self.page_bytes


def read_config(vllm_config: Any) -> LRQKConfig:
    """The plugin's configuration out of vLLM's."""
    additional = vllm_config.additional_config
    values = additional.get("lrqk", {}) if isinstance(additional, dict) else {}
    return LRQKConfig.from_dict(values)


def uses_hot_cache(config: LRQKConfig) -> bool:
    """Whether the hot group exists: "auto" means where host and device memory differ."""
    if config.hot_cache == "auto":
        from vllm.platforms import current_platform

        return not current_platform.is_cpu()
    return bool(config.hot_cache)


def host_plan(vllm_config: Any) -> HostPlan:
    """Memory of the host tier of one rank, and what a page takes of it."""
    config, model, parallel = read_config(vllm_config), vllm_config.model_config, vllm_config.parallel_config
    memory = getattr(vllm_config.additional_config, "host_memory_bytes", None)
    if memory is None:
        memory = _host_memory_bytes(config, parallel)
    layers = -(-model.get_total_num_hidden_layers() // parallel.pipeline_parallel_size)
    heads = model.get_num_kv_heads(parallel)
    return HostPlan(memory, host_page_bytes(config.page_size, heads, model.get_head_size(), model.dtype, layers))


def _host_memory_bytes(config: LRQKConfig, parallel: Any) -> int:
    ranks = max(1, parallel.world_size // max(1, parallel.nnodes))
    if config.host_memory_gib is None:
        return int(free_host_memory() * DEFAULT_MEMORY_SHARE) // ranks
    return int(config.host_memory_gib * GIB) // ranks


def check_host_memory(plan: HostPlan, config: LRQKConfig, max_model_len: int) -> None:
    """Raise ConfigError unless one request of `max_model_len` tokens fits into the host tier."""
    needed = -(-max_model_len // config.page_size) + 1
    if plan.num_pages >= needed:
        return
    source = "lrqk.host_memory_gib" if config.host_memory_gib is not None else "half of the free host memory"
    raise ConfigError(
        f"{source} gives {plan.memory_bytes / GIB:.3g} GiB per rank, but keys and values of max_model_len="
        f"{max_model_len} tokens need {needed * plan.page_bytes / GIB:.3g} GiB: raise lrqk.host_memory_gib "
        "or lower --max-model-len."
    )


def prepare(vllm_config: Any) -> None:
    """Check and complete the configuration of an engine that chose LRQK; leave every other one alone.

    Raises:
        ConfigError: something is set that LRQK cannot serve.
    """
    backend = vllm_config.attention_config.backend
    additional = vllm_config.additional_config
    if backend is None or backend.name != BACKEND:
        if isinstance(additional, dict) and "lrqk" in additional:
            logger.warning_once("additional_config has lrqk settings, but the attention backend is not %s.", BACKEND)
        return
    model = vllm_config.model_config
    if model is None:
        return
    config = read_config(vllm_config)
    check_model(vllm_config, config)
    _warn_untested_version()

    cache = vllm_config.cache_config
    if cache.user_specified_block_size and cache.block_size != config.page_size:
        raise ConfigError(
            f"--block-size is {cache.block_size}, but lrqk.page_size is {config.page_size}: "
            "leave --block-size out and set lrqk.page_size."
        )
    cache.block_size, cache.user_specified_block_size = config.page_size, True

    if vllm_config.device_config.device_type != "cpu":
        check_device(vllm_config, config)
        if config.host_memory_gib is not None and getattr(additional, "host_memory_bytes", None) is None:
            check_pinned_share(int(config.host_memory_gib * GIB), free_host_memory())
    settings = ResolvedSettings(additional if isinstance(additional, dict) else {})
    settings.host_memory_bytes = host_plan(vllm_config).memory_bytes
    vllm_config.additional_config = settings
    plan = host_plan(vllm_config)
    if model.original_max_model_len != -1:
        check_host_memory(plan, config, model.max_model_len)

    parallel = vllm_config.parallel_config
    if not parallel.worker_extension_cls:
        parallel.worker_extension_cls = "vllm_lrqk.integration.worker.WorkerExtension"
    if vllm_config.device_config.device_type == "cpu":
        _size_cpu_pool(vllm_config, config, plan)


def _size_cpu_pool(vllm_config: Any, config: LRQKConfig, plan: HostPlan) -> None:
    """On the CPU platform give the factor pool as many blocks as there are host pages, unless the user sized it.

    vLLM would otherwise offer nearly all memory to factors, many times what the host tier can back.
    """
    cache = vllm_config.cache_config
    if cache.kv_cache_memory_bytes is not None or cache.num_gpu_blocks_override is not None:
        return
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    blocks = plan.num_pages
    if uses_hot_cache(config):
        per_request = hot_format(config, model.get_head_size(), model.dtype).blocks_for(config.num_hot_rows)
        blocks += per_request * vllm_config.scheduler_config.max_num_seqs
    layers = -(-model.get_total_num_hidden_layers() // parallel.pipeline_parallel_size)
    page_bytes = page_format(config, model.get_head_size()).page_bytes
    cache.kv_cache_memory_bytes = blocks * layers * model.get_num_kv_heads(parallel) * page_bytes


def _warn_untested_version() -> None:
    # A warning, not a refusal: a name that has gone fails loudly at start-up, and most releases keep them.
    version = compat.vllm_version()
    if version is not None and version > compat.TESTED_VLLM:
        logger.warning_once("vllm-lrqk is tested with vLLM %d.%d, this is %d.%d.", *compat.TESTED_VLLM, *version)


def select_backend(backend: Any, selector_config: AttentionSelectorConfig) -> str:
    """Class path of the backend on the CPU platform, after the checks that CUDA's selection makes by itself."""
    check_selector(backend.get_class(), selector_config)
    return backend.get_path()


def kv_dtype(vllm_config: Any) -> torch.dtype:
    """Element type of keys and values in the host tier: the model's."""
    return vllm_config.model_config.dtype
