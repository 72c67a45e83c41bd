"""What the machine cannot give, each as one sentence with the setting, its value and the remedy."""

import math
import os
from typing import Any

from vllm_lrqk.core.capacity import HostTier
from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.host_memory import GIB, MAX_SHARE, HostMemory
from vllm_lrqk.core.method import Method
from vllm_lrqk.integration import compat


def check_host_share(asked_gib: float, pool_bytes: int, memory: HostMemory, field: str) -> None:
    """Refuse to take more than `MAX_SHARE` of the memory that this process may use.

    Args:
        asked_gib: for the host tier, all ranks of this host together.
        pool_bytes: of vLLM's pool of blocks, of all ranks, where that is CPU memory as well.
        field: the setting that asks for it.

    Raises:
        ConfigError: it is more.
    """
    most, total = memory.free_bytes * MAX_SHARE, asked_gib * GIB + pool_bytes
    if total <= most:
        return
    pool = f" ({total / GIB:.3g} GiB with what lies beside it)" if pool_bytes else ""
    raise ConfigError(
        f"{field} is {asked_gib:.4g}{pool}, but {memory.free_bytes / GIB:.3g} GiB are free by the count of "
        f"{memory.source}, of which at most {MAX_SHARE:.0%} may be taken: lower it to "
        f"{_floor(asked_gib * most / total)}."
    )


def _floor(value: float) -> str:
    return f"{int(value * 100) / 100:g}"


def check_host_memory(method: Method, host: HostTier, block_size: int, max_model_len: int, ranks: int) -> None:
    """Raise ConfigError unless one request of `max_model_len` tokens fits into the host tier.

    Args:
        ranks: that share the memory of this host.
    """
    needed = -(-max_model_len // block_size) + 1
    if host.num_pages >= needed:
        return
    field = f"{method.settings.key}.host_memory_gib"
    source = field if method.host_memory_gib is not None else "half of the free host memory"
    gib = needed * host.page_bytes / GIB
    remedy = f"raise {field} to {math.ceil(gib * ranks * 1000) / 1000:g}"
    raise ConfigError(
        f"{source} gives {host.memory_bytes / GIB:.3g} GiB per rank, but keys and values of max_model_len="
        f"{max_model_len} tokens need {gib:.3g} GiB: {remedy} or lower --max-model-len."
    )


def check_cpu_binding(vllm_config: Any) -> None:
    """Refuse more ranks than NUMA nodes where vLLM's CPU platform binds each to a node of its own.

    Raises:
        ConfigError: there are more.
    """
    parallel = vllm_config.parallel_config
    ranks = max(1, parallel.world_size // max(1, parallel.nnodes))
    binding = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
    if binding != "auto" or os.environ.get("VLLM_CPU_SIM_MULTI_NUMA", "0") != "0":
        return
    nodes = compat.cpu_memory_nodes()
    if len(nodes) < ranks:
        raise ConfigError(
            f"{ranks} ranks were asked for (tensor times pipeline parallel), but this process may use "
            f"{len(nodes)} NUMA node{'s' * (len(nodes) != 1)}, and vLLM binds one rank to each: "
            "set VLLM_CPU_OMP_THREADS_BIND=nobind, or name the cores of every rank in it (0-7|8-15)."
        )
