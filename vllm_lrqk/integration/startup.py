"""What happens once per engine before anything is allocated: settings are checked and completed."""

from typing import Any

from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_lrqk import names
from vllm_lrqk.core.capacity import backed_blocks
from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.host_memory import host_memory
from vllm_lrqk.core.method import Method
from vllm_lrqk.integration import compat, metrics
from vllm_lrqk.integration.checks import check_model, check_selector
from vllm_lrqk.integration.machine import check_cpu_binding, check_host_memory, check_host_share
from vllm_lrqk.integration.settings import (
    Engine,
    EngineSettings,
    engine_of,
    host_tier,
    make_method,
    misplaced_settings,
    model_group,
    model_heads,
    model_plan,
    rank_memory,
    ranks_per_host,
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

    plan = model_plan(method, vllm_config)
    if cache.user_specified_block_size and cache.block_size != plan.block_size:
        raise ConfigError(
            f"--block-size is {cache.block_size}, but {method.block_size_setting} is {plan.block_size}: "
            f"leave --block-size out and set {method.block_size_setting}."
        )
    cache.block_size, cache.user_specified_block_size = plan.block_size, True

    if not plan.is_paged and cache.enable_prefix_caching:
        logger.warning_once("%s keeps one memory per request, so prefix caching is switched off.", name)
        cache.enable_prefix_caching = False

    is_cpu, parallel = vllm_config.device_config.device_type == "cpu", vllm_config.parallel_config
    engine = getattr(additional, "engine", None)  # of this configuration before vLLM copied it
    is_new = engine is None
    if engine is None:
        if is_cpu:
            check_cpu_binding(vllm_config)
        heads = model_heads(vllm_config)
        memory = rank_memory(method, vllm_config)
        windows, host = host_tier(method, vllm_config, heads, memory)
        engine = Engine(method, model_group(vllm_config), heads, host, metrics.expose(), windows)
    if is_new:  # and else the same object: it is what a worker's layers and vLLM's worker have in common
        vllm_config.additional_config = EngineSettings(additional if isinstance(additional, dict) else {})
        vllm_config.additional_config.engine = engine
    if engine.host is not None and model.original_max_model_len != -1:
        ranks = ranks_per_host(vllm_config)
        check_host_memory(method, engine.host, plan.block_size, model.max_model_len, ranks)
    if not parallel.worker_extension_cls:
        parallel.worker_extension_cls = names.WORKER_EXTENSION
    if is_cpu:
        _size_cpu_pool(vllm_config, engine)
    if is_new and engine.host is not None:
        _check_free_memory(vllm_config, method, is_cpu)


def _size_cpu_pool(vllm_config: Any, engine: Engine) -> None:
    """On the CPU platform give the pool as many blocks as there are host pages, unless the user sized it.

    vLLM would otherwise offer nearly all memory to it, many times what the host tier can back.
    """
    cache = vllm_config.cache_config
    if engine.host is None or cache.kv_cache_memory_bytes is not None or cache.num_gpu_blocks_override is not None:
        return
    blocks = backed_blocks(engine.plan(vllm_config), engine.host, vllm_config.scheduler_config.max_num_seqs)
    if engine.windows is not None:
        blocks += len(engine.windows.blocks)
    cache.kv_cache_memory_bytes = blocks * engine.capacity(vllm_config, blocks).block_bytes


def _check_free_memory(vllm_config: Any, method: Method, is_cpu: bool) -> None:
    if method.host_memory_gib is None:
        return
    pool = vllm_config.cache_config.kv_cache_memory_bytes or 0 if is_cpu else 0
    windows = engine_of(vllm_config).windows
    if windows is not None:  # which the method's host memory is asked for as well
        pool = max(0, pool - len(windows.blocks) * windows.plan.block_bytes)
    pool *= ranks_per_host(vllm_config)
    check_host_share(method.host_memory_gib, pool, host_memory(), f"{method.settings.key}.host_memory_gib")


def _warn_untested_version() -> None:
    # A warning, not a refusal: a name that has gone fails loudly at start-up, and most releases keep them.
    version = compat.vllm_version()
    if version is None or version <= compat.TESTED_VLLM:
        return
    tried = ", whose Python part was tried on the CPU platform" if version <= compat.TRIED_VLLM else ""
    logger.warning_once("vllm-lrqk is tested with vLLM %d.%d, this is %d.%d%s.", *compat.TESTED_VLLM, *version, tried)


def select_backend(backend: Any, selector_config: AttentionSelectorConfig) -> str:
    """Class path of the backend on the CPU platform, after the checks that CUDA's selection makes by itself."""
    if selector_config.has_sliding_window:
        backend = compat.registered_backend(names.WINDOW_BACKEND)
    check_selector(backend.get_class(), selector_config)
    return backend.get_path()


def start_line(vllm_config: Any, kernels: str, num_blocks: int) -> str:
    """What an engine has room for, for the log.

    Args:
        kernels: names of those that its layers run.
        num_blocks: of vLLM's pool.
    """
    engine = engine_of(vllm_config)
    room, length = engine.capacity(vllm_config, num_blocks), vllm_config.model_config.max_model_len
    variant = f"{engine.method.variant}, " if engine.method.variant else ""
    start = f"{engine.method.name} ({variant}{kernels} kernels):"
    if not room.plan.is_paged:
        return (
            f"{start} {room.device_bytes_per_request / 2**20:,.1f} MiB per request and rank, however long it is; "
            f"room for {(num_blocks - 1) // room.plan.blocks_per_request:,} requests of any length."
        )
    dense = f"dense attention would have had {room.dense_tokens:,} in the same device memory"
    tokens = f"room for {room.tokens(length):,} tokens"
    if room.host_tokens is None:
        return f"{start} {room.device_bytes_per_token:,} device bytes per token and rank; {tokens}; {dense}."
    return (
        f"{start} {room.device_bytes_per_token} device bytes and {room.host_bytes_per_token} host bytes per token and "
        f"rank; {tokens} (host memory holds {room.host_tokens:,}, device memory {room.device_tokens:,}); {dense}."
    )
