"""One engine's method and host memory: settled once, and handed on with vLLM's configuration to every process."""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.host_pages import DEFAULT_MEMORY_SHARE, GIB, free_host_memory, host_page_bytes
from vllm_lrqk.core.method import MemoryPlan, Method
from vllm_lrqk.methods import METHODS, method_class


@dataclass(frozen=True)
class HostPlan:
    """How the host tier of one rank is cut."""

    memory_bytes: int
    page_bytes: int

    @property
    def num_pages(self) -> int:
        """Host pages, the null block's included."""
        return self.memory_bytes // self.page_bytes


@dataclass(frozen=True, eq=False)
class Engine:
    """What an engine was started with.

    Args:
        host: the host tier of one rank; None where the method has none.
    """

    method: Method
    group: int
    """Query heads per KV head."""
    host: HostPlan | None = None

    @property
    def num_host_pages(self) -> int | None:
        """Block ids below this have a host page; None without a host tier."""
        return None if self.host is None else self.host.num_pages

    def plan(self, vllm_config: Any) -> MemoryPlan:
        """What a layer of the model needs."""
        model = vllm_config.model_config
        return self.method.plan(model.get_head_size(), model.dtype, self.group)


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
    for other in values:
        if str(other) != key and str(other).lower() == key:
            raise ConfigError(
                f"additional_config has {other!r}, but the settings of {name} are under {key!r}: rename it."
            )
    return found(found.settings_type.from_dict(values.get(key, {})), device_type)


def misplaced_settings(additional: Any) -> list[str]:
    """Keys of `additional_config` that are a method's."""
    known = {name.lower() for name in METHODS}
    return [key for key in additional if str(key).lower() in known] if isinstance(additional, dict) else []


def host_plan(method: Method, vllm_config: Any) -> HostPlan | None:
    """The host tier of one rank: what the settings ask for, or a share of what is free; None if it has none."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    plan = method.plan(model.get_head_size(), model.dtype, model_group(vllm_config))
    if not plan.host_bytes_per_token:
        return None
    ranks = max(1, parallel.world_size // max(1, parallel.nnodes))
    asked = method.host_memory_gib
    memory = int(free_host_memory() * DEFAULT_MEMORY_SHARE) if asked is None else int(asked * GIB)
    heads, layers = model.get_num_kv_heads(parallel), num_layers(vllm_config)
    page_bytes = host_page_bytes(plan.block_size, heads, model.get_head_size(), model.dtype, layers)
    return HostPlan(memory // ranks, page_bytes)


def model_group(vllm_config: Any) -> int:
    """Query heads per KV head of one rank."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)


def num_layers(vllm_config: Any) -> int:
    """Layers of one rank."""
    parallel = vllm_config.parallel_config.pipeline_parallel_size
    return -(-vllm_config.model_config.get_total_num_hidden_layers() // parallel)


def kv_dtype(vllm_config: Any) -> torch.dtype:
    """Element type of keys and values: the model's."""
    return vllm_config.model_config.dtype


def current_device(vllm_config: Any) -> torch.device:
    """This worker's device."""
    kind = vllm_config.device_config.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
