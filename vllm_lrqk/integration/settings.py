"""One engine's method and host memory: settled once, and handed on with vLLM's configuration to every process."""

from dataclasses import dataclass, fields
from typing import Any

import torch

from vllm_lrqk.core.capacity import Capacity, HostTier
from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.host_memory import DEFAULT_SHARE, GIB, free_host_memory
from vllm_lrqk.core.method import MemoryPlan, Method
from vllm_lrqk.core.model_heads import kv_heads_of_blocks, rank_heads
from vllm_lrqk.core.windows import WindowLayers, Windows, full_attention_layers, windows_beside
from vllm_lrqk.integration import compat
from vllm_lrqk.methods import METHODS, method_class


@dataclass(frozen=True, eq=False)
class Engine:
    """What an engine was started with.

    Args:
        heads: KV heads of all layers of one rank that the method serves, of that rank with most.
        host: the host tier of one rank; None where the method has none.
        metrics_folder: where its processes write what `/metrics` shows; None: nowhere.
    """

    method: Method
    group: int
    """Query heads per KV head."""
    heads: int
    host: HostTier | None = None
    metrics_folder: str | None = None
    windows: Windows | None = None
    """Layers with a sliding window; None: all layers are the method's."""

    @property
    def num_host_pages(self) -> int | None:
        """Block ids below this have a host page; None without a host tier."""
        return None if self.host is None else self.host.num_pages

    @property
    def first_spare_block(self) -> int | None:
        """Block ids from this on hold neither tokens nor windows; None without a host tier."""
        return self.num_host_pages if self.windows is None else self.windows.blocks.stop

    def plan(self, vllm_config: Any) -> MemoryPlan:
        """What a layer of the model needs."""
        return model_plan(self.method, vllm_config)

    def capacity(self, vllm_config: Any, num_blocks: int) -> Capacity:
        """What a pool of so many blocks, the null block included, has room for."""
        model, plan = vllm_config.model_config, self.plan(vllm_config)
        dense_bytes = 2 * model.get_head_size() * model.dtype.itemsize
        max_requests = vllm_config.scheduler_config.max_num_seqs
        rest = (0, 0) if self.windows is None else (self.windows.plan.block_bytes, len(self.windows.blocks))
        return Capacity(plan, self.heads, dense_bytes, num_blocks, self.num_host_pages, max_requests, *rest)


class EngineSettings(dict):
    """vLLM's `additional_config` plus the engine that it describes.

    An attribute rather than an item: it reaches every worker with the configuration, but stays out of
    the hash that names compiled graphs, which a figure of free memory would change at every start.
    """

    engine: Engine


def engine_of(vllm_config: Any) -> Engine:
    """The engine of a configuration that `prepare` has completed."""
    return vllm_config.additional_config.engine


def make_method(name: str, additional: Any, device_type: str) -> Method:
    """The method of this name with its settings from vLLM's `additional_config`.

    Raises:
        ConfigError: a setting is not allowed, or is under a key that is not the method's.
    """
    found = method_class(name)
    values = additional if isinstance(additional, dict) else {}
    key = found.settings_type.key
    own = [item.name for item in fields(found.settings_type)]
    for other in map(str, values):
        if other != key and other.lower() == key:
            raise ConfigError(
                f"additional_config has {other!r}, but the settings of {name} are under {key!r}: rename it."
            )
        if other.lower() in {method.lower() for method in METHODS} - {key}:
            raise ConfigError(
                f"additional_config has {other!r}, but the attention backend is {name}, "
                f"whose settings are under {key!r}: remove it."
            )
        if other in own and key not in values:
            raise ConfigError(
                f"additional_config has {other!r} at its top, but it is a setting of {name}: "
                f'write {{"{key}": {{"{other}": {values[other]!r}}}}}.'
            )
    return found(found.settings_type.from_dict(values.get(key, {})), device_type)


def misplaced_settings(additional: Any) -> list[str]:
    """Keys of `additional_config` that are a method's."""
    known = {name.lower() for name in METHODS}
    return [key for key in additional if str(key).lower() in known] if isinstance(additional, dict) else []


def rank_memory(method: Method, vllm_config: Any) -> int:
    """Bytes for keys and values of one rank: its part of what the settings ask for, or of a share of what is free."""
    asked = method.host_memory_gib
    memory = int(free_host_memory() * DEFAULT_SHARE) if asked is None else int(asked * GIB)
    return memory // ranks_per_host(vllm_config)


def host_tier(method: Method, vllm_config: Any, heads: int, memory: int) -> tuple[Windows | None, HostTier | None]:
    """What windows take of a rank's memory for keys and values, and the host tier of the rest.

    Args:
        heads: KV heads of all layers of the rank that the method serves.
        memory: as `rank_memory`.
    """
    plan, layers, cache = model_plan(method, vllm_config), window_layers(vllm_config), vllm_config.cache_config
    if layers is None:
        return None, HostTier.of(plan, heads, memory)
    requests, in_flight = vllm_config.scheduler_config.max_num_seqs, vllm_config.max_in_flight_tokens
    pool = cache.kv_cache_memory_bytes, cache.num_gpu_blocks_override
    return windows_beside(layers, plan, heads, memory, requests, in_flight, *pool)


def window_layers(vllm_config: Any) -> WindowLayers | None:
    """The layers with a sliding window; None where all layers attend to all tokens."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    kinds = getattr(model.hf_text_config, "layer_types", None) or ()
    count = sum(kind == "sliding_attention" for kind in kinds)
    if model.disable_sliding_window or not count or not model.get_sliding_window():
        return None
    row = 2 * model.get_head_size() * model.dtype.itemsize
    return WindowLayers(model.get_sliding_window(), count, model.get_num_kv_heads(parallel) * row)


def ranks_per_host(vllm_config: Any) -> int:
    """Ranks that share the memory of this host, those of all its data parallel engines together."""
    parallel = vllm_config.parallel_config
    engines = max(1, parallel.data_parallel_size_local) if parallel.data_parallel_size > 1 else 1
    return max(1, parallel.world_size // max(1, parallel.nnodes)) * engines


def model_plan(method: Method, vllm_config: Any) -> MemoryPlan:
    """What a layer of the model needs, for each KV head."""
    model = vllm_config.model_config
    return method.plan(model.get_head_size(), model.dtype, model_group(vllm_config))


def model_group(vllm_config: Any) -> int:
    """Query heads per KV head of one rank."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)


def model_heads(vllm_config: Any) -> int:
    """KV heads of all layers of one rank that the method serves, of that rank with most."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    layers = model.get_total_num_hidden_layers()
    heads = kv_heads_of_blocks(model.hf_text_config, model.model_arch_config.total_num_attention_heads)
    if heads is None:
        heads = [model.model_arch_config[layer].total_num_kv_heads for layer in range(layers)]
    if window_layers(vllm_config) is not None:
        served = full_attention_layers(model.hf_text_config.layer_types, layers)
        heads = [count if layer in served else 0 for layer, count in enumerate(heads)]
    return rank_heads(heads, parallel.tensor_parallel_size, compat.pipeline_stages(vllm_config))


def kv_dtype(vllm_config: Any) -> torch.dtype:
    """Element type of keys and values: the model's."""
    return vllm_config.model_config.dtype


def current_device(vllm_config: Any) -> torch.device:
    """This worker's device."""
    kind = vllm_config.device_config.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
