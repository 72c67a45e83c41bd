"""What happens once per engine before anything is allocated: settings are checked and completed."""

from typing import Any

from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_lrqk import names
from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.host_pages import GIB, free_host_memory
from vllm_lrqk.integration import compat
from vllm_lrqk.integration.checks import check_host_memory, check_model, check_pinned_share, check_selector
from vllm_lrqk.integration.settings import (
    Engine,
    EngineSettings,
    engine_of,
    host_plan,
    make_method,
    misplaced_settings,
    model_group,
    num_layers,
)
from vllm_lrqk.methods import METHODS

logger = compat.logger("lrqk")


def chosen_method(attention_config: Any) -> str | None:
    """The backend name of the method that the configuration names, for all layers or for a kind of them.

    Raises:
        ConfigError: it names one for layers that no method serves.
    """
    per_kind = {kind: backend.name for kind, backend in attention_config.backend_per_kind.items()}
    for kind, name in per_kind.items():
        if name in METHODS and kind != "full_attention":
            raise ConfigError(
                f"backend_per_kind[{kind!r}] is {name}, but {name} serves full_attention only: remove it."
            )
    backend = None if attention_config.backend is None else attention_config.backend.name
    name = per_kind.get("full_attention", backend)
    return name if name in METHODS else None


def prepare(vllm_config: Any) -> None:
    """Check and complete the configuration of an engine that chose a method; leave every other one alone.

    Raises:
        ConfigError: something is set that cannot be served.
    """
    name, additional = chosen_method(vllm_config.attention_config), vllm_config.additional_config
    if name is None:
        for key in misplaced_settings(additional):
            logger.warning_once("additional_config has %s settings, but the attention backend is another.", key)
        return
    model, cache = vllm_config.model_config, vllm_config.cache_config
    if model is None:
        return
    method = make_method(name, additional, vllm_config.device_config.device_type)
    check_model(vllm_config, method)
    _warn_untested_version()

    group = model_group(vllm_config)
    plan = method.plan(model.get_head_size(), model.dtype, group)
    if cache.user_specified_block_size and cache.block_size != plan.block_size:
        raise ConfigError(
            f"--block-size is {cache.block_size}, but {method.block_size_setting} is {plan.block_size}: "
            f"leave --block-size out and set {method.block_size_setting}."
        )
    cache.block_size, cache.user_specified_block_size = plan.block_size, True

    if not plan.is_paged and cache.enable_prefix_caching:
        logger.warning_once("%s keeps one memory per request, so prefix caching is switched off.", name)
        cache.enable_prefix_caching = False

    engine = getattr(additional, "engine", None)  # of this configuration before vLLM copied it
    if engine is None:
        engine = Engine(method, group, host_plan(method, vllm_config))
        if vllm_config.device_config.device_type != "cpu" and method.host_memory_gib is not None:
            field = f"{method.settings.key}.host_memory_gib"
            check_pinned_share(int(method.host_memory_gib * GIB), free_host_memory(), field)
    vllm_config.additional_config = EngineSettings(additional if isinstance(additional, dict) else {})
    vllm_config.additional_config.engine = engine
    if engine.host is not None and model.original_max_model_len != -1:
        check_host_memory(method, engine.host, plan.block_size, model.max_model_len)

    parallel = vllm_config.parallel_config
    if not parallel.worker_extension_cls:
        parallel.worker_extension_cls = names.WORKER_EXTENSION
    if vllm_config.device_config.device_type == "cpu":
        _size_cpu_pool(vllm_config, engine)


def _size_cpu_pool(vllm_config: Any, engine: Engine) -> None:
    """On the CPU platform give the pool as many blocks as there are host pages, unless the user sized it.

    vLLM would otherwise offer nearly all memory to it, many times what the host tier can back.
    """
    cache, plan = vllm_config.cache_config, engine.plan(vllm_config)
    if engine.host is None or cache.kv_cache_memory_bytes is not None or cache.num_gpu_blocks_override is not None:
        return
    blocks = engine.host.num_pages + plan.blocks_per_request * vllm_config.scheduler_config.max_num_seqs
    kv_heads = vllm_config.model_config.get_num_kv_heads(vllm_config.parallel_config)
    cache.kv_cache_memory_bytes = blocks * num_layers(vllm_config) * kv_heads * plan.block_bytes


def _warn_untested_version() -> None:
    # A warning, not a refusal: a name that has gone fails loudly at start-up, and most releases keep them.
    version = compat.vllm_version()
    if version is not None and version > compat.TESTED_VLLM:
        logger.warning_once("vllm-lrqk is tested with vLLM %d.%d, this is %d.%d.", *compat.TESTED_VLLM, *version)


def select_backend(backend: Any, selector_config: AttentionSelectorConfig) -> str:
    """Class path of the backend on the CPU platform, after the checks that CUDA's selection makes by itself."""
    check_selector(backend.get_class(), selector_config)
    return backend.get_path()


def start_line(vllm_config: Any, layers: int, kv_heads: int, kernels: str, num_blocks: int) -> str:
    """What an engine has room for, for the log.

    Args:
        layers: of this rank.
        num_blocks: of vLLM's pool.
    """
    engine, plan = engine_of(vllm_config), engine_of(vllm_config).plan(vllm_config)
    model, heads = vllm_config.model_config, layers * kv_heads
    start = f"{engine.method.name} ({kernels} kernels):"
    if not plan.is_paged:
        bytes_per_request = heads * plan.block_bytes * plan.blocks_per_request
        requests = (num_blocks - 1) // plan.blocks_per_request
        return (
            f"{start} {bytes_per_request / 2**20:,.1f} MiB per request and rank, however long it is; "
            f"room for {requests:,} requests of any length."
        )
    device_bytes, device_tokens = heads * plan.bytes_per_token, num_blocks * plan.block_size
    dense_bytes = heads * 2 * model.get_head_size() * model.dtype.itemsize
    dense = (
        f"dense attention would have had {int(device_tokens * device_bytes / dense_bytes):,} in the same device memory"
    )
    if engine.host is None:
        return f"{start} {device_bytes:,} device bytes per token and rank; room for {device_tokens:,} tokens; {dense}."
    page_size, host_bytes = plan.block_size, engine.host.page_bytes // plan.block_size
    host_tokens = (engine.host.num_pages - 1) * page_size
    tokens = min(host_tokens, (num_blocks - 1) * page_size)
    room = f"room for {tokens:,} tokens (host memory holds {host_tokens:,}, device memory {device_tokens:,})"
    return f"{start} {device_bytes} device bytes and {host_bytes} host bytes per token and rank; {room}; {dense}."
